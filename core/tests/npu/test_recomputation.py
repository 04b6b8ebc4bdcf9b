"""What is kept where blocks are computed again on an NPU."""

import pytest
import torch
from mindspeed_model_core.testing import npu_emulator
from mindspeed_model_core.testing.dist import run_on
from mindspeed_model_core.testing.recomputation import BLOCKS, LENGTHS, attend, check_kept
from mindspeed_model_core.testing.suite import needs_emulator

pytestmark = [pytest.mark.npu, needs_emulator]
NPU = torch.device("npu:0" if npu_emulator.installed() else "cpu")  # without torch_npu torch does not know the name


def _fused(documents: str, keep: str) -> int:
    from mindspeed_model_core.testing.npu_emulator.operators import CALLS

    del CALLS[:]
    attend(documents, True, keep, NPU, torch.bfloat16)
    return sum(call.name == "npu_fusion_attention" for call in CALLS)


@pytest.mark.parametrize("documents", LENGTHS)
def test_attention_can_be_kept(documents: str) -> None:
    run_on("npu", check_kept, 1, documents, NPU, torch.float32)


@pytest.mark.parametrize("documents", LENGTHS)
def test_the_fused_operator_itself_runs_once_where_it_is_kept(documents: str) -> None:
    def run() -> tuple[int, int]:
        return _fused(documents, "nothing"), _fused(documents, "attention")

    assert run_on("npu", run, 1)[0] == (4 * BLOCKS, 2 * BLOCKS)
