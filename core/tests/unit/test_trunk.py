"""Recomputation runs the first blocks again, as they ran."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mindspeed_model_core import trunk
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
    with pytest.raises(UserError, match=f"compile: .*{said}"):
        apply._compile(toy.Toy(toy.ToyConfig()), SimpleNamespace(type=kind), True)


class Numbered(toy.Toy):
    """Takes a number of the batch as a constant."""

    def context(self, batch):
        return {**super().context(batch), "number": batch.get("number")}

    def constants(self, context):
        return None if context["number"] is None else (context["number"],)


def test_blocks_run_compiled_for_the_first_few_kinds_of_batches_and_uncompiled_for_others(monkeypatch):
    net, ran = Numbered(toy.ToyConfig()), []
    block = next(net.blocks.children())
    plain = type(block)._call_impl
    block._compiled_call_impl = lambda *args: (ran.append("compiled"), plain(block, *args))[1]
    monkeypatch.setattr(trunk, "GRAPHS", 2)
    for number in (1, 2, 3, None, 1):
        net.compiled = False
        want = net({**toy.batch(1), "number": number}).sum()
        net.compiled = True
        ran.clear()
        assert torch.equal(net({**toy.batch(1), "number": number}).sum(), want)
        assert ran == (["compiled"] if number in (1, 2) else [])


def test_a_block_that_runs_uncompiled_leaves_others_compiled():
    blocks, seen = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2)), []
    for block in blocks:
        block._compiled_call_impl = "its graph"

    def step(index, block, state, context):
        seen.append([each._compiled_call_impl for each in blocks])
        raise KeyError

    with pytest.raises(KeyError):
        trunk._uncompiled(step, 0, blocks[0], {}, {})
    assert seen == [[None, "its graph"]] and [each._compiled_call_impl for each in blocks] == ["its graph"] * 2
