"""The comparison of layouts sees what is wrong, whatever is nan and whoever holds it."""

import pytest
import torch
from mindspeed_model_core.testing import equivalence
from mindspeed_model_core.testing.equivalence import Trace, whole

WANT = {"w": [((0,), torch.tensor([1.0, 2.0]))]}
NAN = float("nan")

JOB = equivalence.Job(None, None, None)


def held(at, *values):
    return {"w": [((at,), torch.tensor(values))]}


@pytest.mark.parametrize("order", [1, -1])
def test_nan_on_one_replica_stays(order):
    parts = [held(0, 1.0, 2.0), held(0, NAN, 2.0)][::order]
    assert whole(parts, WANT)["w"].isnan().tolist() == [True, False]


@pytest.mark.parametrize("order", [1, -1])
def test_the_furthest_replica_stays(order):
    assert whole([held(0, 1.0, 2.0), held(0, 1.0, 5.0)][::order], WANT)["w"].tolist() == [1.0, 5.0]


def test_what_nobody_holds_is_named():
    with pytest.raises(AssertionError, match="w: nobody holds 1 of its 2 elements"):
        whole([held(1, 2.0)], WANT)


def sound():
    return Trace([1.0, 2.0], [3.0, 4.0], WANT, WANT)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (Trace([1.0, NAN], [3.0, 4.0], WANT, WANT), "losses are not finite"),
        (Trace([1.0, 2.0], [3.0, NAN], WANT, WANT), "norms are not finite"),
        (Trace([1.0, 2.0], [3.0, 4.0], held(0, NAN, 2.0), WANT), "gradients of w are not finite"),
        (Trace([1.0, 2.0], [3.0, 4.0], WANT, held(0, 1.0, NAN)), "parameters of w are not finite"),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_nan_never_passes(monkeypatch, broken, said, alone):
    one, ranks = (broken, [broken, broken]) if alone else (sound(), [sound(), broken])
    monkeypatch.setattr(equivalence, "trace", lambda job, layout: one)
    monkeypatch.setattr(equivalence, "run_dist", lambda function, world, job, layout: ranks)
    with pytest.raises(AssertionError, match=f"{'one process' if alone else 'rank 1'}: {said}"):
        equivalence.assert_equivalent(JOB, 2, {}, 1e-9)
    monkeypatch.setattr(equivalence, "trace", lambda job, layout: sound())
    monkeypatch.setattr(equivalence, "run_dist", lambda function, world, job, layout: [sound(), sound()])
    equivalence.assert_equivalent(JOB, 2, {}, 1e-9)
