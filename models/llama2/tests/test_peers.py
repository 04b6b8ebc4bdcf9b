"""Llama-2 beside transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mindspeed_model_core import peers
from mindspeed_model_llama2 import MODEL

CPU = torch.device("cpu")
SMALL = ("preset=tiny", "data.sequence_length=64", "global_batch=4")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "peers.py"
    spec = importlib.util.spec_from_file_location("llama2_peers", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parity
@pytest.mark.parametrize("work", ["7b", "7b-packed", "tiny", "tiny-packed"])
def test_ours_and_transformers_do_the_same_work(benchmark: ModuleType, work: str) -> None:
    """Losses and the gradient's norm agree, at sizes that a CPU holds; both sides see the same documents."""
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


def test_padded_documents_are_all_there(benchmark: ModuleType) -> None:
    batch = {"tokens": torch.arange(1, 11), "labels": torch.arange(11, 21), "lengths": (3, 1, 4, 2)}
    first, second = benchmark.padded(3)(batch)
    assert first["tokens"].tolist() == [[4, 0, 0], [9, 10, 0], [1, 2, 3]] and second["tokens"].tolist() == [
        [5, 6, 7, 8]
    ]
    assert first["labels"].tolist() == [[14, -100, -100], [19, 20, -100], [11, 12, 13]]
