"""Wan2.1 beside diffusers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mindspeed_model_core import peers
from mindspeed_model_wan21 import MODEL

CPU = torch.device("cpu")
SMALL = ("preset=tiny-t2v", "data.synthetic=[5,48,48]")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "peers.py"
    spec = importlib.util.spec_from_file_location("wan21_peers", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parity
@pytest.mark.parametrize("work", ["t2v-1.3b", "t2v-1.3b-lora", "tiny", "tiny-lora"])
def test_ours_and_diffusers_do_the_same_work(benchmark: ModuleType, work: str) -> None:
    """Losses and the gradient's norm agree, at sizes that a CPU holds; adapters start from the same factors."""
    (what,) = peers.chosen(benchmark.COMPARISONS, [work], CPU)
    small = () if what.tiny else SMALL
    report = peers.compare(MODEL, what, device=CPU, steps=1, warmup=1, overrides=small, modes=["eager"])
    assert [(side.name, side.settings, side.said) for side in report.sides if side.said] == []
    ours, others = report.sides[0], report.sides[len(what.ours) :]
    assert others and report.best in others and ours.ratio is not None
    close = 0.01 if ours.recipe.precision == "bf16-pure" else 1e-4
    for side in report.sides[1:]:
        assert side.done[0].norm == pytest.approx(ours.done[0].norm, rel=close) and ours.done[0].norm != 0
        assert side.done[1].loss == pytest.approx(ours.done[1].loss, rel=close)
