"""Wan2.1 beside diffusers."""

from __future__ import annotations

import pytest
from mindspeed_model_core.testing.beside import assert_same_work, load_benchmark
from mindspeed_model_wan21 import MODEL


@pytest.mark.parity
@pytest.mark.parametrize("work", ["t2v-1.3b", "t2v-1.3b-lora", "tiny", "tiny-lora"])
def test_ours_and_diffusers_do_the_same_work(work: str) -> None:
    """Adapters start from the same factors."""
    assert_same_work(MODEL, load_benchmark(__file__), work, ["preset=tiny-t2v", "data.synthetic=[5,48,48]"])
