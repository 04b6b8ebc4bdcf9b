"""What is kept where blocks are computed again on this machine's accelerator."""

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core.testing.recomputation import LENGTHS, check_kept

BOUND = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # kernels add up gradients in no fixed order


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("documents", LENGTHS)
def test_attention_can_be_kept(documents, dtype):
    check_kept(documents, devices.pick(), dtype, BOUND[dtype])
