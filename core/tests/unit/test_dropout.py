"""A fused op with dropout draws from the device's generator and is its formula for what it drew."""

import pytest
import torch
from mindspeed_model_core.testing.op_cases import norm


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_add_layer_norm_is_its_formula_for_what_it_dropped(dtype, bound) -> None:
    norm.check_dropout(torch.device("cpu"), dtype, bound)
