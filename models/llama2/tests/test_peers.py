"""Llama-2 beside transformers."""

from __future__ import annotations

import pytest
import torch
from mindspeed_model_core.testing.beside import assert_same_work, load_benchmark
from mindspeed_model_llama2 import MODEL

SMALL = ("preset=tiny", "data.sequence_length=64", "global_batch=4")


@pytest.mark.parity
@pytest.mark.parametrize("work", ["7b", "7b-packed", "tiny", "tiny-packed"])
def test_ours_and_transformers_do_the_same_work(work: str) -> None:
    """Both sides see the same documents."""
    assert_same_work(MODEL, load_benchmark(__file__), work, SMALL)


def test_padded_documents_are_all_there() -> None:
    batch = {"tokens": torch.arange(1, 11), "labels": torch.arange(11, 21), "lengths": (3, 1, 4, 2)}
    first, second = load_benchmark(__file__).padded(3)(batch)
    assert first["tokens"].tolist() == [[4, 0, 0], [9, 10, 0], [1, 2, 3]]
    assert second["tokens"].tolist() == [[5, 6, 7, 8]]
    assert first["labels"].tolist() == [[14, -100, -100], [19, 20, -100], [11, 12, 13]]
