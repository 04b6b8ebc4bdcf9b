"""A fused op with dropout, on this machine's accelerator, is its formula for what it dropped."""

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import ops
from mindspeed_model_core.testing.op_cases import norm


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-3), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("level", [0, 2])
def test_add_layer_norm_is_its_formula_for_what_it_dropped(level, dtype, bound) -> None:
    with ops.at_level(level):
        norm.check_dropout(devices.pick(), dtype, bound)
