"""Phases of a step on an NPU are told by events in its queue; the emulator's profiler has no timeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mindspeed_model_core import breakdown
from mindspeed_model_core.breakdown import COLUMNS, PHASES, Clock
from mindspeed_model_core.parallel.mesh import open_mesh
from mindspeed_model_core.testing import toy
from mindspeed_model_core.testing.dist import run_on
from mindspeed_model_core.testing.suite import needs_emulator
from mindspeed_model_core.train import Session

pytestmark = [pytest.mark.npu, needs_emulator]


def _taken() -> tuple[bool, dict[str, float], float, bool, dict[str, str]]:
    recipe = toy.recipe(global_batch=4)
    session = Session(recipe, toy.TOY, open_mesh(recipe.parallel), synthetic=True)
    session.start()
    session.step()
    clock = Clock(session.mesh.device)
    session.step(clock.mark)
    clock.mark()
    torch.npu.synchronize()  # type: ignore[attr-defined]
    events = all(isinstance(mark, torch.npu.Event) for mark in clock._marks)  # type: ignore[attr-defined]
    whole = clock._marks[0].elapsed_time(clock._marks[-1]) / 1e3
    found = breakdown.take(session, clock, 1)
    return events, clock.phases(), whole, found.recorded is None, dict(breakdown.rows(found))


def test_phases_are_told_by_events_and_what_is_unknown_is_not_a_number() -> None:
    for events, phases, whole, unknown, said in run_on("npu", _taken, 2):
        assert events and set(phases) == set(PHASES) - {"pipeline"}
        assert all(seconds > 0 for name, seconds in phases.items() if name in ("forward", "backward", "optimizer"))
        assert sum(phases.values()) == pytest.approx(whole, rel=1e-3, abs=1e-4)
        assert unknown and said["communication, idle"] == "not told: the profiler saw nothing run on the device"


def test_torch_npu_names_the_columns_that_are_read() -> None:
    def titles() -> Any:
        from torch_npu.profiler.analysis.prof_view._trace_step_time_parser import TraceStepTimeParser as Table

        return Table.STEP_TRACE, Table.title

    ((file, columns),) = run_on("npu", titles, 1)
    assert file == "step_trace_time.csv" and set(COLUMNS) <= set(columns)
