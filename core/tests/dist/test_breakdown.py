"""Ranks tell of communication, and a stage of the pipeline what it waits for."""

from __future__ import annotations

from typing import Any

import pytest
from mindspeed_model_core import breakdown
from mindspeed_model_core.breakdown import Activity, Breakdown, Clock
from mindspeed_model_core.parallel.mesh import open_mesh
from mindspeed_model_core.testing import toy
from mindspeed_model_core.testing.dist import run_dist
from mindspeed_model_core.train import Session


def _taken(layout: dict[str, Any]) -> tuple[list[str], Breakdown, Activity | None]:
    """Return the marks of a step of two micro-batches, its breakdown, and what this rank recorded."""
    recipe = toy.recipe(parallel=layout, global_batch=4 if not layout.get("pp") else 2)
    session = Session(recipe, toy.TOY, open_mesh(recipe.parallel), synthetic=True)
    session.start()
    marks: list[str] = []
    session.step(marks.append)
    clock = Clock(session.mesh.device)
    session.step(clock.mark)
    clock.mark()
    return marks, breakdown.take(session, clock, 1), breakdown.record(session)


DRAWN = ["data", "data", "encode", "data", "encode"]
FORWARD, BACKWARD = ["forward", "pipeline"], ["backward", "pipeline"]


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"shard": "zero3"}], ids=str)
def test_communication_is_told(layout):
    (marks, found, mine), (_, other, _) = run_dist(_taken, 2, layout)
    if not layout.get("tp"):
        assert marks == [*DRAWN, "forward", "backward", "forward", "backward", "reduction", "optimizer"]
    assert found == other and found.ranks == 2  # every rank is told the same
    assert found.recorded is not None and 0 < found.recorded.communication < found.recorded.step_s
    assert found.recorded.idle is None and found.recorded.exposed is None
    assert mine is not None and mine.communication > 0
    assert found.seconds("forward") > 0 and found.seconds("pipeline") == 0
    assert all(phase.slowest >= phase.seconds for phase in found.phases)


def test_a_stage_tells_of_its_transfers():
    (first, found, _), (last, _, _) = run_dist(_taken, 2, {"pp": 2})
    # One forward one backward: the first stage is a micro-batch ahead.
    end = ["reduction", "optimizer"]
    assert first == [*DRAWN, "pipeline", *FORWARD, *FORWARD, *BACKWARD, *BACKWARD, *end]
    assert last == [*DRAWN, "pipeline", *FORWARD, *BACKWARD, *FORWARD, *BACKWARD, *end]
    assert found.seconds("pipeline") > 0 and found.seconds("forward") > 0 and found.seconds("backward") > 0
    assert found.recorded is not None and 0 < found.recorded.communication < found.recorded.step_s
