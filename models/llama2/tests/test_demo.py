"""The demo's own tools."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from mindspeed_model_core.errors import UserError
from mindspeed_model_llama2 import demo


def test_a_child_is_found_without_any_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slim container has no ps."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        monkeypatch.setenv("PATH", "")
        assert demo._child(os.getpid()) == child.pid
        with pytest.raises(UserError, match=f"process {child.pid} has no child"):
            demo._child(child.pid)
    finally:
        child.kill()
        child.wait()
