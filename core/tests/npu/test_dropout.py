"""A fused op with dropout, on an emulated NPU, is its formula for what it dropped."""

from __future__ import annotations

import pytest
import torch
from mindspeed_model_core.testing.dist import run_on
from mindspeed_model_core.testing.op_cases import norm
from mindspeed_model_core.testing.suite import needs_emulator

pytestmark = [pytest.mark.npu, needs_emulator]


def _check(dtype: torch.dtype, bound: float) -> set[str]:
    from mindspeed_model_core.testing.npu_emulator.operators import CALLS

    norm.check_dropout(torch.device("npu:0"), dtype, bound)
    return {call.name for call in CALLS}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_add_layer_norm_is_its_formula_for_what_it_dropped(dtype: torch.dtype, bound: float) -> None:
    assert {"npu_add_layer_norm", "npu_add_layer_norm_backward"} <= run_on("npu", _check, 1, dtype, bound)[0]
