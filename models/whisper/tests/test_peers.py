"""Whisper beside transformers."""

from __future__ import annotations

import pytest
from mindspeed_model_core.testing.beside import assert_same_work, load_benchmark
from mindspeed_model_whisper import MODEL


@pytest.mark.parity
@pytest.mark.parametrize("work", ["large-v3", "tiny"])
def test_ours_and_transformers_do_the_same_work(work: str) -> None:
    assert_same_work(MODEL, load_benchmark(__file__), work, ("preset=mini", "data.synthetic=32", "data.workers=0"))
