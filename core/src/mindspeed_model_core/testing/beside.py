"""What a model's ``benchmarks/peers.py`` must pass: the peers that it names do the same work, at sizes for a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ..model import Model
from ..perf import peers


def load_benchmark(tests: str) -> ModuleType:
    """Return the benchmark of the model whose tests are in this file."""
    path = Path(tests).parents[1] / "benchmarks" / "peers.py"
    spec = importlib.util.spec_from_file_location(f"{path.parents[1].name}_peers", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same_work(model: Model, benchmark: ModuleType, work: str, small: Sequence[str]) -> None:
    """Train all sides of a work for two steps, shrunk by ``small`` unless it is tiny; losses and gradients agree."""
    device = torch.device("cpu")
    (what,) = peers.chosen(benchmark.COMPARISONS, [work], device)
    changes = () if what.tiny else tuple(small)
    report = peers.compare(model, what, device=device, steps=1, warmup=1, overrides=changes, modes=["eager"])
    assert [(side.name, side.settings, side.said) for side in report.sides if side.said] == []
    ours, others = report.sides[0], [side for side in report.sides if side.peer is not None]
    assert others and report.best in others and ours.ratio is not None
    close = 0.01 if ours.recipe.precision == "bf16-pure" else 1e-4
    for side in report.sides[1:]:
        assert side.done[0].norm == pytest.approx(ours.done[0].norm, rel=close) and ours.done[0].norm != 0
        assert side.done[1].loss == pytest.approx(ours.done[1].loss, rel=close)
