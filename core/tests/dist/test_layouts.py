"""The toy under every layout: biases, stacked parts, widths that data ranks do not divide."""

import pytest
import torch
import torch.distributed as dist
from mindspeed_model_core import nn as layers
from mindspeed_model_core import ops
from mindspeed_model_core.parallel import apply, pipeline, shard
from mindspeed_model_core.parallel.mesh import open_mesh
from mindspeed_model_core.parallel.tensor import TensorParallel
from mindspeed_model_core.recipe import ParallelConfig
from mindspeed_model_core.testing import toy
from mindspeed_model_core.testing.dist import run_dist
from mindspeed_model_core.testing.equivalence import LAYOUTS, Job, assert_equivalent
from mindspeed_model_core.testing.tolerance import FP64
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

JOB = Job(
    build=lambda: toy.Toy(toy.ToyConfig()),
    task=toy.ToyTask(toy.recipe(), toy.ToyConfig()),
    batches=lambda step: [toy.batch(8 * step + i) for i in range(8)],
)
EXTRA = {
    "dp3-zero3": (3, {"shard": "zero3"}),
    "dp8-zero3": (8, {"shard": "zero3"}),  # more ranks than a norm has elements
    "tp2-sequence-dp2": (4, {"tp": 2, "sequence": True}),
    "pp2-dp2-zero2": (4, {"pp": 2, "shard": "zero2"}),
}


def six(step):
    return [toy.batch(6 * step + i) for i in range(6)]


# The toy's stacked parts are 10 and 2 units: tp 4 does not divide them.
@pytest.mark.parametrize("name", [n for n in {**LAYOUTS, **EXTRA} if n != "tp4"])
def test_equals_one_process(name):
    world, fields = {**LAYOUTS, **EXTRA}[name]
    job = Job(JOB.build, JOB.task, six) if name == "dp3-zero3" else JOB
    assert_equivalent(job, world, fields, FP64)


def test_micro_batches_of_different_length_cross_stages():
    job = Job(JOB.build, JOB.task, lambda step: [toy.batch(8 * step + i, rows=4 + 2 * (i % 3)) for i in range(8)])
    assert_equivalent(job, 2, {"pp": 2}, FP64)
    assert_equivalent(job, 8, {"tp": 2, "sequence": True, "pp": 2, "shard": "zero3"}, FP64)


def test_a_data_rank_without_labels():
    def batches(step):
        out = [toy.batch(8 * step + i) for i in range(8)]
        for batch in out[1::2]:
            batch["labels"][:] = -100
        return out

    for layout in ({}, {"shard": "zero2"}):
        assert_equivalent(Job(JOB.build, JOB.task, batches), 2, layout, FP64)


# The last is a layout whose replicas have buffers.
SUMS = {
    "pp2": (2, {"pp": 2}),
    "tp2-sequence-pp2": (4, {"pp": 2, "tp": 2, "sequence": True}),
    "pp2-dp2": (4, {"pp": 2}),
}


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("name", SUMS)
def test_layers_that_add_up_their_gradients_equal_those_that_do_not(name, recompute, monkeypatch):
    """Across stages, an earlier micro-batch's gradients come to be between one's forward and its recomputation."""
    monkeypatch.setattr(shard, "SUMMING", ("cpu",))
    world, fields = SUMS[name]
    assert_equivalent(Job(JOB.build, JOB.task, JOB.batches, recompute=recompute), world, fields, FP64)


def test_fewer_micro_batches_than_stages():
    job = Job(JOB.build, JOB.task, lambda step: [toy.batch(2 * step + i) for i in range(2)])
    assert_equivalent(job, 4, {"pp": 4}, FP64)


def _region(sequence):
    """Return output and input gradient of a column-row pair, joined over the tokens, with the unsplit ones."""
    mesh = open_mesh(ParallelConfig(tp=2, sequence=sequence), torch.device("cpu"))
    torch.manual_seed(0)
    up = layers.Linear(6, 8, split="out").double()
    down = layers.Linear(8, 6, split="in").double()
    whole = torch.randn(4, 6, dtype=torch.float64)
    x = whole.clone().requires_grad_()
    y = down(up(x).tanh())
    y.square().sum().backward()
    tp = TensorParallel(mesh.groups["tp"], mesh.tp_rank, 2, sequence)
    for layer in (up, down):
        for name, placement in layer.placements().items():
            share = placement.narrow(getattr(layer, name).detach(), mesh.tp_rank, 2)
            setattr(layer, name, torch.nn.Parameter(share))
        layer.tp = tp
    local = (whole.chunk(2)[mesh.tp_rank] if sequence else whole).clone().requires_grad_()
    out = down(up(local).tanh())
    out.square().sum().backward()
    return y.detach(), x.grad, out.detach(), local.grad


@pytest.mark.parametrize("sequence", [False, True])
def test_input_gradients_cross_a_tensor_parallel_region(sequence):
    results = run_dist(_region, 2, sequence)
    y, grad = results[0][:2]
    outs, grads = ([r[i] for r in results] for i in (2, 3))
    if sequence:
        outs, grads = [torch.cat(outs)] * 2, [torch.cat(grads)] * 2
    for out, got in zip(outs, grads, strict=True):
        assert torch.allclose(out, y, atol=1e-12) and torch.allclose(got, grad, atol=1e-12)


def _vocabulary():
    torch.manual_seed(0)
    logits = torch.randn(5, 8, dtype=torch.float64)
    labels = torch.tensor([0, 7, 3, -100, 4])
    rank = dist.get_rank()
    local = logits.chunk(2, 1)[rank].clone().requires_grad_()
    loss = ops.cross_entropy(local, labels, start=4 * rank, group=dist.group.WORLD)
    (loss * torch.arange(1, 6)).sum().backward()
    return loss.detach(), local.grad


def test_cross_entropy_over_a_split_vocabulary():
    torch.manual_seed(0)
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 7, 3, -100, 4])
    want = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    (want * torch.arange(1, 6)).sum().backward()
    (loss, left), (_, right) = run_dist(_vocabulary, 2)
    assert torch.allclose(loss, want, atol=1e-12)
    assert torch.allclose(torch.cat((left, right), 1), logits.grad, atol=1e-12)


def test_a_failing_rank_fails_the_test():
    def boom():
        if dist.get_rank() == 1:
            raise RuntimeError("rank one breaks")
        dist.barrier()

    with pytest.raises(AssertionError, match="rank one breaks"):
        run_dist(boom, 2)


def _collectives(layout, precision):
    """Return how often FSDP2 gathers weights and reduces gradients, and in which dtype, in four micro-batches."""
    mesh = open_mesh(ParallelConfig(**layout), torch.device("cpu"))
    seen = []
    for name in ("foreach_all_gather", "foreach_reduce"):
        real = getattr(_fsdp_param_group, name)

        def counted(*args, real=real, name=name, **kwargs):
            dtypes = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
            seen.append(name if name == "foreach_all_gather" else f"{name} in {dtypes[-1]}")
            return real(*args, **kwargs)

        setattr(_fsdp_param_group, name, counted)
    with torch.device("meta"):
        net = toy.Toy(toy.ToyConfig())
    parallel = apply.parallelize(net, mesh, ParallelConfig(**layout), precision=precision)
    apply.initialise(parallel, 0)
    batches = [toy.batch(i) for i in range(4)]
    pipeline.run(parallel, batches, lambda out, _: out.sum(), torch.tensor(20.0))
    return {kind: seen.count(kind) for kind in set(seen)}


def test_each_zero_stage_communicates_as_it_should():
    """Five units (four blocks and the rest) and four micro-batches; zero3 gathers blocks again for backward."""
    counts = {s: run_dist(_collectives, 2, {"shard": s}, "bf16")[0] for s in ("zero1", "zero2", "zero3")}
    gathers = {"zero1": 5, "zero2": 5, "zero3": 4 * (5 + 4)}
    reduces = {"zero1": 5, "zero2": 20, "zero3": 20}
    assert counts == {
        s: {"foreach_all_gather": gathers[s], "foreach_reduce in torch.float32": reduces[s]} for s in counts
    }


def _written(fields):
    parallel = ParallelConfig(**fields)
    made = apply.parallelize(toy.Toy(toy.ToyConfig()).to("meta"), open_mesh(parallel), parallel)
    return {
        (name, at, tuple(made.shards[name].master[here].shape))
        for name, shard in made.shards.items()
        if shard.writes
        for at, here in shard.rectangles()
    }


@pytest.mark.parametrize("fields", [{}, {"tp": 2, "shard": "zero1"}, {"tp": 2}, {"pp": 2}])
def test_each_element_is_written_once_and_by_all_in_turn(fields):
    shares = run_dist(_written, 4, fields)
    whole = {n: p.numel() for n, p in toy.Toy(toy.ToyConfig()).named_parameters()}
    written = dict.fromkeys(whole, 0)
    for name, _, size in (item for share in shares for item in share):
        written[name] += torch.Size(size).numel()
    assert written == whole
    assert all(shares) and not set.intersection(*shares)


class Tied(toy.Toy):
    """The table is the head too."""

    first, last, tied = (), ("norm",), ("table",)

    def __init__(self, config):
        super().__init__(config)
        self.table, self.norm = layers.TiedVocab(12, config.width), layers.RMSNorm(config.width, 1e-6)
        del self.head

    def finish(self, state, context):
        return self.table.head(self.norm(state["x"]), context["labels"])


TIED = {
    "pp2": (2, {"pp": 2}),
    "pp4": (4, {"pp": 4}),
    "tp2-sequence-pp2-dp2-zero3": LAYOUTS["tp2-sequence-pp2-dp2-zero3"],
    "pp2-dp2-zero2": (4, {"pp": 2, "shard": "zero2"}),
    "tp2-pp2-dp2": (8, {"tp": 2, "pp": 2}),
}


@pytest.mark.parametrize("name", TIED)
def test_a_table_that_both_ends_use_equals_one_process(name):
    assert_equivalent(Job(lambda: Tied(toy.ToyConfig()), JOB.task, JOB.batches), *TIED[name], FP64)


def _held(layout):
    mesh = open_mesh(ParallelConfig(**layout), torch.device("cpu"))
    with torch.device("meta"):
        net = Tied(toy.ToyConfig())
    table = apply.parallelize(net, mesh, ParallelConfig(**layout)).shards.get("table.weight")
    return None if table is None else (table.tied, table.counted, table.writes)


def test_one_of_both_ends_counts_and_writes_what_is_tied():
    """The middle stages do without."""
    assert run_dist(_held, 4, {"pp": 4}) == [(True, True, True), None, None, (True, False, False)]
