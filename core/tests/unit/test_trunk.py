"""Recomputation runs the first blocks again, as they ran."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.parallel import apply
from mindspeed_model_core.testing import toy


class Counted(toy.Toy):
    """Notes which blocks run, and drops some of what they return."""

    def step(self, index, block, state, context):
        self.ran.append(index)
        return {"x": F.dropout(super().step(index, block, state, context)["x"], 0.5)}


def gradients(recompute):
    torch.manual_seed(0)
    net = Counted(toy.ToyConfig()).double()
    net.recompute, net.ran = recompute, []
    net(toy.batch(1)).sum().backward()
    return net.ran, [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_blocks_run_again_with_the_same_random_numbers(count):
    plain, want = gradients(0)
    ran, got = gradients(count)
    assert plain == [0, 1, 2, 3] and ran == plain + list(reversed(range(count)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("kind", "said"), [("cpu", "this network's blocks cannot"), ("npu", "for CUDA and CPU alone")])
def test_what_cannot_be_compiled_is_refused(kind, said):
    with pytest.raises(UserError, match=f"compile=true: .*{said}"):
        apply._compile(toy.Toy(toy.ToyConfig()), SimpleNamespace(type=kind))
