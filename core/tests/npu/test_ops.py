"""Every op on emulated NPUs: what the table names serves it, calls what it says, and equals the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mindspeed_model_core import ops
from mindspeed_model_core.testing import npu_emulator
from mindspeed_model_core.testing.dist import run_on
from mindspeed_model_core.testing.op_cases import CASES, CHECKS, check
from mindspeed_model_core.testing.op_cases.case import in_types
from mindspeed_model_core.testing.suite import needs_emulator

pytestmark = [pytest.mark.npu, needs_emulator]
NPU = torch.device("npu:0" if npu_emulator.installed() else "cpu")  # without torch_npu torch does not know the name
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def _all_cases(name: str) -> list[str]:
    """Check all cases of an op in both types; return what went wrong, and the calls that no case made."""
    from mindspeed_model_core.testing.npu_emulator.operators import CALLS

    wrong, made, promised = [], set(), {call for e in ops.TABLE[name].entries.get("npu", ()) for call in e.calls}
    for case, dtype in (each.values for each in in_types((c for c in CASES if c.op.name == name), BOUND)):
        del CALLS[:]
        try:
            entry = check(case, NPU, dtype, BOUND[dtype]).entry
        except Exception as error:
            wrong.append(f"{case} in {dtype}: {error}")
            continue
        here = {call.name.partition(".")[0] for call in CALLS}
        made |= here
        if promised and (entry is None or not here) != ("npu" in case.reference_on):
            wrong.append(f"{case} in {dtype}: served by {'the reference' if entry is None else entry.calls}, {here}")
    return wrong + [f"{call} was never called" for call in sorted(promised - made)]


@pytest.mark.parametrize("name", sorted({case.op.name for case in CASES}))
def test_each_op_is_served_by_its_entry_and_equals_the_formula(name: str) -> None:
    wrong: Any = run_on("npu", _all_cases, 1, name)[0]
    assert not wrong, "\n".join(wrong)


def _check_at(name: str, level: int) -> tuple[set[str], set[str]]:
    """Run an op's own check in both types; return the calls that its entries promise, and those that were made."""
    from mindspeed_model_core.testing.npu_emulator.operators import CALLS

    del CALLS[:]
    for dtype, bound in BOUND.items():
        with ops.at_level(level):
            CHECKS[name](NPU, dtype, bound)
    promised = {call for entry in ops.TABLE[name].entries.get("npu", ()) for call in entry.calls}
    return promised, {call.name.partition(".")[0] for call in CALLS}


@pytest.mark.parametrize("name", CHECKS)
def test_each_op_of_its_own_kind_too(name: str) -> None:
    promised, made = run_on("npu", _check_at, 1, name, 1)[0]
    assert promised <= made and (promised or name in ("linear_cross_entropy", "sum_rows"))  # PyTorch's own
    assert not run_on("npu", _check_at, 1, name, 0)[0][1]
