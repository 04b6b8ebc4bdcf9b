"""Products of tensor parallelism with their collectives, in chunks and in turn: exact, and as often as they should."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mindspeed_model_core import lora, ops
from mindspeed_model_core.parallel import apply
from mindspeed_model_core.parallel.mesh import open_mesh
from mindspeed_model_core.recipe import LoraConfig, ParallelConfig
from mindspeed_model_core.testing import toy
from mindspeed_model_core.testing.dist import run_dist
from mindspeed_model_core.testing.equivalence import Job, Trace, assert_equivalent, trace, whole
from mindspeed_model_core.testing.tolerance import FP64, assert_close
from mindspeed_model_core.trunk import _policy
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNKS = (1, 2, 4, 8)
IN, OUT = 6, 10  # of one rank
TOKENS = (0, 1, 5, 9)  # of one rank: fewer than chunks, and numbers that they do not divide
KINDS = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def _both(
    name: str, tokens: int, chunks: int, frozen: bool, group: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """Return an op's value and gradients, those of the whole product of all ranks, and how often it communicated."""
    rank, ranks = group.rank(), group.size()
    column, shared = name in ("column_matmul", "all_gather_matmul"), name not in ("column_matmul", "matmul_all_reduce")
    whole_x = draw(tokens * ranks, 3, IN if column else IN * ranks).requires_grad_()
    whole_w = draw(OUT * ranks if column else OUT, whole_x.shape[-1]).requires_grad_(not frozen)
    whole_b = draw(len(whole_w)).requires_grad_() if column else None
    want = torch.nn.functional.linear(whole_x, whole_w, whole_b)
    wanted_grad = draw(*want.shape, seed=5)
    (want * wanted_grad).sum().backward()

    def share(t: Tensor | None, dim: int, cut: bool = True) -> Tensor:
        assert t is not None
        mine = t.shape[dim] // ranks
        return t.detach().narrow(dim, rank * mine, mine) if cut else t.detach()

    if column:
        x, at = share(whole_x, 0, shared), share(whole_w, 0)
        wanted = {"value": share(want, -1), "x": share(whole_x.grad, 0, shared)}
        grad = share(wanted_grad, -1)
    else:
        x, at = share(whole_x, -1), share(whole_w, 1)
        wanted = {"value": share(want, 0, shared), "x": share(whole_x.grad, -1)}
        grad = share(wanted_grad, 0, shared)
    x, weight = x.clone().requires_grad_(), at.clone().requires_grad_(not frozen)
    operands: list[Any] = [x, weight]
    if column:
        bias = share(whole_b, 0).clone().requires_grad_()
        operands.append(bias)
        wanted["bias"] = share(whole_b.grad, 0)  # type: ignore[union-attr]
    if not frozen:
        wanted["weight"] = share(whole_w.grad, 0 if column else 1)

    counts = dict.fromkeys(KINDS, 0)
    real = {kind: getattr(dist, kind) for kind in KINDS}

    def counted(kind: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[kind] += 1
            return real[kind](*args, **kwargs)

        return call

    for kind in KINDS:
        setattr(dist, kind, counted(kind))
    try:
        y = getattr(ops, name)(*operands, group, chunks=chunks)
        y.backward(grad)
    finally:
        for kind in KINDS:
            setattr(dist, kind, real[kind])
    found = {"value": y.detach(), "x": x.grad}
    if column:
        found["bias"] = bias.grad
    if weight.grad is not None:
        found["weight"] = weight.grad
    return found, wanted, counts


def _all(ranks: int) -> int:
    checked = 0
    for name in ("column_matmul", "all_gather_matmul", "matmul_all_reduce", "matmul_reduce_scatter"):
        for tokens in TOKENS:
            for chunks in CHUNKS:
                for frozen in (False, True):
                    found, wanted, counts = _both(name, tokens, chunks, frozen, dist.group.WORLD)
                    said = f"{name} tokens={tokens} chunks={chunks} frozen={frozen}"
                    assert found.keys() == wanted.keys(), said
                    for what, value in wanted.items():
                        assert found[what].shape == value.shape, f"{said}: {what}"
                        assert torch.allclose(found[what], value, rtol=0, atol=1e-12), f"{said}: {what}"
                    rows = 3 * tokens * (ranks if name in ("column_matmul", "matmul_all_reduce") else 1)
                    step = -(-rows // chunks)
                    parts = -(-rows // step) if rows else 1 if chunks == 1 else 0
                    again = int(name == "all_gather_matmul" and not frozen)
                    want = {
                        "column_matmul": {"all_reduce": parts},
                        "matmul_all_reduce": {"all_reduce": parts},
                    }.get(name, {"all_gather_into_tensor": parts + again, "reduce_scatter_tensor": parts})
                    assert {k: n for k, n in counts.items() if n} == {k: n for k, n in want.items() if n}, said
                    checked += 1
    return checked


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_op_equals_the_whole_product(ranks: int) -> None:
    assert run_dist(_all, ranks, ranks) == [4 * len(TOKENS) * len(CHUNKS) * 2] * ranks


def _kept(name: str, frozen: bool) -> list[tuple[int, ...]]:
    """Return the shapes of what forward keeps for backward."""
    kept: list[tuple[int, ...]] = []
    x = draw(4, 6).requires_grad_()
    weight = draw(10, 6).requires_grad_(not frozen)
    between = () if name.startswith("matmul") else (None,)

    def keep(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        getattr(ops, name)(x, weight, *between, dist.group.WORLD, chunks=2)
    return kept


@pytest.mark.parametrize("name", ["column_matmul", "all_gather_matmul", "matmul_all_reduce", "matmul_reduce_scatter"])
def test_gathered_tokens_are_not_kept_nor_the_input_of_a_frozen_weight(name: str) -> None:
    assert run_dist(_kept, 2, name, False)[0] == [(4, 6), (10, 6)]
    assert run_dist(_kept, 2, name, True)[0] == [(10, 6)]


def _again(keep: str, chunks: int) -> Tensor:
    """Return the gradient of something whose backward needs the sum over ranks, computed again."""
    x = draw(4, 6).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return ops.keeping(ops.matmul_all_reduce, x, draw(10, 6), dist.group.WORLD, chunks=chunks).sin()

    checkpoint(run, x, use_reentrant=False, **_policy(keep)).sum().backward()
    return x.grad


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_kept_product_is_not_summed_twice(chunks: int) -> None:
    def run() -> tuple[Tensor, Tensor]:
        return _again("nothing", chunks), _again("products", chunks)

    for plain, kept in run_dist(run, 2):
        assert torch.equal(plain, kept)


def test_chunks_are_of_level_two() -> None:
    x = torch.ones(4, 6)
    for name in ("column_matmul", "all_gather_matmul", "matmul_all_reduce", "matmul_reduce_scatter"):
        op = ops.TABLE[name]
        for kind in ("cpu", "cuda"):
            assert op.serving(kind, x, x, chunks=2) is not None and op.serving(kind, x, x, chunks=1) is None
            with ops.at_level(1):
                assert op.serving(kind, x, x, chunks=2) is None


# The toy's stacked parts are even multiples of four units here, so that tp 4 divides them.
CONFIG = toy.ToyConfig(blocks=2, width=8, hidden=24, aside=8)


def _job(rows: int, *, adapted: bool = False, recompute: str = "none", keep: str = "nothing") -> Job:
    def build() -> Any:
        net = toy.Toy(CONFIG)
        return lora.attach(net, LoraConfig(rank=3, alpha=5.0)) if adapted else net

    return Job(
        build=build,
        task=toy.ToyTask(toy.recipe(), CONFIG),
        batches=lambda step: [toy.batch(4 * step + i, rows=rows) for i in range(4)],
        steps=3,
        recompute=recompute,
        recompute_keep=keep,
    )


@pytest.fixture(autouse=True)
def both_factors_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """B begins at zero, and A then has no gradient in the first step."""
    monkeypatch.setattr(lora, "initialise", lambda name, whole, generator: whole.normal_(0, 0.3, generator=generator))


LAYOUTS: dict[str, tuple[int, dict[str, Any], int, dict[str, Any]]] = {
    "tp2-2": (2, {"tp": 2, "overlap_chunks": 2}, 7, {}),
    "tp2-4": (2, {"tp": 2, "overlap_chunks": 4}, 7, {}),
    "tp2-sequence-2": (2, {"tp": 2, "sequence": True, "overlap_chunks": 2}, 10, {}),
    "tp2-sequence-8": (2, {"tp": 2, "sequence": True, "overlap_chunks": 8}, 6, {}),
    "tp4-sequence-2": (4, {"tp": 4, "sequence": True, "overlap_chunks": 2}, 12, {}),
    "tp4-sequence-4": (4, {"tp": 4, "sequence": True, "overlap_chunks": 4}, 20, {}),
    "tp2-sequence-dp2-4": (4, {"tp": 2, "sequence": True, "overlap_chunks": 4}, 10, {}),
    "tp2-dp2-zero3-2": (4, {"tp": 2, "shard": "zero3", "overlap_chunks": 2}, 7, {}),
    "tp2-sequence-dp2-zero2-4": (4, {"tp": 2, "sequence": True, "shard": "zero2", "overlap_chunks": 4}, 10, {}),
    "tp2-sequence-pp2-2": (4, {"tp": 2, "sequence": True, "pp": 2, "overlap_chunks": 2}, 10, {}),
    "recompute-4": (2, {"tp": 2, "sequence": True, "overlap_chunks": 4}, 10, {"recompute": "all"}),
    "recompute-all-but-attention-2": (
        2,
        {"tp": 2, "overlap_chunks": 2},
        7,
        {"recompute": "all", "keep": "attention"},
    ),
    "recompute-all-but-products-in-turn": (2, {"tp": 2}, 7, {"recompute": "all", "keep": "products"}),
    "recompute-all-but-products-2": (
        2,
        {"tp": 2, "overlap_chunks": 2},
        7,
        {"recompute": "all", "keep": "products"},
    ),
    "recompute-all-but-products-sequence-2": (
        2,
        {"tp": 2, "sequence": True, "overlap_chunks": 2},
        10,
        {"recompute": "all", "keep": "products"},
    ),
    "lora-2": (2, {"tp": 2, "overlap_chunks": 2}, 7, {"adapted": True}),
    "lora-sequence-recompute-4": (
        2,
        {"tp": 2, "sequence": True, "overlap_chunks": 4},
        10,
        {"adapted": True, "recompute": "all"},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_network_in_chunks_trains_as_one_process(name: str) -> None:
    world, fields, rows, how = LAYOUTS[name]
    assert_equivalent(_job(rows, **how), world, fields, FP64)


def _megatrons(shared: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what our column and row give in fp32, and what megatron's functions give."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
    from mindspeed_model_core.parallel.mesh import open_mesh
    from mindspeed_model_core.recipe import ParallelConfig

    mesh = open_mesh(ParallelConfig(tp=2, sequence=shared), torch.device("cpu"))
    group = mesh.groups["tp"]

    def theirs(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
        y = linear_with_grad_accumulation_and_async_allreduce(x, up, bias, False, not shared, shared)
        product = torch.nn.functional.linear(y.tanh(), down)
        if shared:
            return mappings.reduce_scatter_to_sequence_parallel_region(product)
        return mappings.reduce_from_tensor_model_parallel_region(product)

    def ours(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> Tensor:
        y = (ops.all_gather_matmul if shared else ops.column_matmul)(x, up, bias, group)
        return (ops.matmul_reduce_scatter if shared else ops.matmul_all_reduce)(y.tanh(), down, group)

    def run(function: Any) -> dict[str, Tensor]:
        shapes = ((6, 3, 8), (10, 8), (10,), (7, 10))
        operands = [draw(*s, seed=mesh.tp_rank if shared or n else 0).float() for n, s in enumerate(shapes)]
        operands = [x.requires_grad_() for x in operands]
        out = function(*operands)
        out.square().sum().backward()
        return {"value": out.detach()} | {str(n): x.grad for n, x in enumerate(operands)}  # type: ignore[misc]

    return run(ours), run(theirs)


@pytest.mark.parametrize("shared", [False, True])
def test_products_in_turn_are_megatrons_to_the_last_bit(shared: bool) -> None:
    for ours, theirs in run_dist(_megatrons, 2, shared):
        assert ours.keys() == theirs.keys() and len(ours) == 5
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert_close(ours, theirs, 1e-12)


def _order(name: str) -> list[str]:
    """Return in which order products and collectives begin and are waited for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.overloadpacket is torch.ops.aten.mm:
                seen.append("product")
            return function(*args, **(kwargs or {}))

    class Work:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            seen.append("wait")
            self.work.wait()

    def logged(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append("begin")
            return Work(real(*args, **kwargs))

        return call

    for kind in KINDS:
        setattr(dist, kind, logged(getattr(dist, kind)))
    x, weight = draw(4, 6).requires_grad_(), draw(10, 6).requires_grad_()
    with Log():
        y = getattr(ops, name)(x, weight, *(() if name.startswith("matmul") else (None,)), dist.group.WORLD, chunks=2)
        seen.append("backward")
        y.sum().backward()
    return seen


ORDER = {
    # The gradient of the weight is the last product: it runs beside what is still on its way.
    "column_matmul": "product / product begin product begin product wait wait",
    "all_gather_matmul": "begin begin wait product wait product / begin product begin product begin wait product wait wait",
    "matmul_all_reduce": "product begin product begin wait wait / product product",
    "matmul_reduce_scatter": "product begin product begin wait wait / begin begin wait product wait product product",
}


@pytest.mark.parametrize("name", ORDER)
def test_one_parts_collective_runs_beside_the_next_ones_product(name: str) -> None:
    assert " ".join(run_dist(_order, 2, name)[0]).replace("backward", "/") == ORDER[name]


BF16 = 0.03


def _in_bf16(job: Job, layout: dict[str, Any]) -> tuple[int, Trace]:
    """Return how many products were added to fp32 buffers in a training in bf16, and its trace."""
    module: Any = sys.modules["mindspeed_model_core.ops.linear"]
    real, calls = module.accumulate_product_, []

    def counted(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        assert total.dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
        calls.append(total.shape)
        return real(total, a, b)  # type: ignore[no-any-return]

    module.accumulate_product_ = counted
    try:
        found = trace(job, layout)
    finally:
        module.accumulate_product_ = real
    return len(calls), found


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        ({"tp": 2}, "none"),
        ({"tp": 2, "overlap_chunks": 2}, "none"),
        ({"tp": 2, "sequence": True}, "none"),
        ({"tp": 2, "sequence": True, "overlap_chunks": 4}, "all"),
    ],
    ids=str,
)
def test_cut_weights_add_their_gradient_to_the_master_type(layout: dict[str, Any], recompute: str) -> None:
    plain = _job(10, recompute=recompute)
    job = Job(plain.build, plain.task, plain.batches, steps=1, precision="bf16", recompute=recompute)
    truth = trace(Job(plain.build, plain.task, plain.batches, steps=1), {}).gradients
    want = {name: pieces[0][1].float() for name, pieces in truth.items()}
    spread = run_dist(_in_bf16, 2, job, layout)
    # Three layers of each of two blocks and the head, in each of four micro-batches.
    assert [calls for calls, _ in spread] == [4 * 7] * 2
    got = whole([found.gradients for _, found in spread], {n: [(p[0][0], p[0][1].float())] for n, p in truth.items()})
    assert_close(got, want, BF16)


def test_shards_of_fsdp_take_their_gradient_from_autograd() -> None:
    plain = _job(10)
    job = Job(plain.build, plain.task, plain.batches, steps=1, precision="bf16")
    found = run_dist(_in_bf16, 4, job, {"tp": 2, "sequence": True, "shard": "zero2", "overlap_chunks": 2})
    assert [calls for calls, _ in found] == [0] * 4


def _asked(layout: dict[str, Any]) -> set[int]:
    """Return in how many parts the cut layers of a spread network are asked to overlap."""
    config = ParallelConfig(**layout)
    with torch.device("meta"):
        net: Any = toy.Toy(toy.ToyConfig())
    apply.parallelize(net, open_mesh(config, torch.device("cpu")), config)
    return {module.tp.chunks for module in net.modules() if getattr(module, "tp", None) is not None}


def test_the_recipes_chunks_reach_every_layer() -> None:
    assert run_dist(_asked, 2, {"tp": 2, "overlap_chunks": 4}) == [{4}] * 2
    assert run_dist(_asked, 2, {"tp": 2}) == [{1}] * 2
