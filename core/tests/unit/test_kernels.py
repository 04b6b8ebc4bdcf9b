"""Triton's kernels on the CPU, by its interpreter: what CUDA is served by them, against the formulas."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).parent / "interpreted_kernels.py"


@pytest.mark.skipif(
    find_spec("triton") is None,
    reason="Triton is not installed; nox -s kernels puts it beside",
)
def test_kernels_equal_their_formulas():
    """In a process of its own: Triton picks its interpreter when it is imported."""
    ran = subprocess.run(
        [sys.executable, INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    held = {line.split("-")[0] for line in ran.stdout.splitlines()}
    assert held == {"adamw_", "adaln", "add_layer_norm", "layer_norm", "sum_rows", "swiglu"}
