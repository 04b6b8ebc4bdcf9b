"""FLUX.1 beside diffusers."""

from __future__ import annotations

import pytest
from mindspeed_model_core.testing.beside import assert_same_work, load_benchmark
from mindspeed_model_flux import MODEL


@pytest.mark.parity
@pytest.mark.parametrize("work", ["dev", "dev-lora", "tiny", "tiny-lora"])
def test_ours_and_diffusers_do_the_same_work(work: str) -> None:
    """Adapters start from the same factors."""
    changes = ["preset=tiny", "data.height=64", "data.width=64", "data.synthetic=[64,64]", "data.text_tokens=16"]
    assert_same_work(MODEL, load_benchmark(__file__), work, changes)
