"""Processes kept from case to case, as tests on accelerators use them, here on the CPU."""

import operator
import os
import time
from typing import Any

import pytest
from mindspeed_model_core.testing import toy
from mindspeed_model_core.testing.crew import Crew
from mindspeed_model_core.testing.suite import ModelSuite

PAIRS = ["tp2", "tp2-sequence", "pp2", "dp2", "dp2-zero1", "dp2-zero2", "dp2-zero3"]


@pytest.fixture(scope="module")
def two():
    crew = Crew(2, device="cpu", timeout=60)
    yield crew
    crew.close()


class ToyAsModel(ModelSuite):
    """The toy as a package's suite has its model: only what two devices need is here."""

    __test__ = False
    model = toy.TOY
    where = "mindspeed_model_core.testing.toy:TOY"
    batch = reference = reference_run = outputs = None  # type: ignore[assignment]

    def recipe(self, folder: Any, **changes: Any) -> Any:
        return toy.recipe(**changes)


@pytest.mark.parametrize("pair", PAIRS)
def test_two_equal_one(two, pair, tmp_path):
    ToyAsModel().assert_pair_equals_one(two, pair, tmp_path)


def test_processes_stay_from_case_to_case(two):
    assert two.run("first", os.getpid) == two.run("second", os.getpid)
    assert two.run("who", os.getenv, "RANK") == ["0", "1"]


@pytest.mark.parametrize(
    ("function", "args", "said"),
    [
        (operator.truediv, (1, 0), "^odd: rank [01] of 2: Traceback(.|\n)*ZeroDivisionError: division by zero"),
        (os._exit, (7,), "^odd: rank [01] of 2: ended with exit status 7"),
    ],
)
def test_a_failed_case_is_named_and_the_next_one_is_well(two, function, args, said):
    with pytest.raises(AssertionError, match=said):
        two.run("odd", function, *args)
    assert two.run("next", os.getenv, "WORLD_SIZE") == ["2", "2"]


def test_a_case_that_hangs_is_named_and_tells_where():
    crew = Crew(2, device="cpu", timeout=60)
    try:
        crew.run("warm", os.getpid)
        crew.timeout = 0.5
        with pytest.raises(AssertionError, match=r"^slow: 2 of 2 ranks did not end within 0.5 s\nrank 0:\n(.|\n)*in _serve(.|\n)*rank 1:\n(.|\n)*in _serve"):
            crew.run("slow", time.sleep, 60)
        crew.timeout = 60
        assert len(set(crew.run("next", os.getpid))) == 2
    finally:
        crew.close()


def test_a_layout_that_trains_otherwise_is_seen(two, tmp_path):
    class Odd(ToyAsModel):
        def recipe(self, folder: Any, **changes: Any) -> Any:
            return toy.recipe(**changes, seed=1 if changes["parallel"] else 0)

    with pytest.raises(AssertionError):
        Odd().assert_pair_equals_one(two, "tp2", tmp_path)
    ToyAsModel().assert_pair_equals_one(two, "tp2", tmp_path / "sound")
