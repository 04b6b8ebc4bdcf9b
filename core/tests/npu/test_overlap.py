"""Products that CANN overlaps with their collectives (MC2), and sums in fp32, are what training on NPUs calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from mindspeed_model_core import ops
from mindspeed_model_core.parallel import apply, pipeline
from mindspeed_model_core.parallel.mesh import open_mesh
from mindspeed_model_core.recipe import ParallelConfig
from mindspeed_model_core.testing import toy
from mindspeed_model_core.testing.dist import run_on
from mindspeed_model_core.testing.equivalence import Pieces, whole
from mindspeed_model_core.testing.suite import needs_emulator
from mindspeed_model_core.testing.tolerance import assert_close
from torch import Tensor

pytestmark = [pytest.mark.npu, needs_emulator]
COLUMNS = ("column_matmul", "all_gather_matmul")
SHARED = ("all_gather_matmul", "matmul_reduce_scatter")
GATHER, SCATTER, REDUCE = "npu_all_gather_base_mm", "npu_mm_reduce_scatter_base", "npu_mm_all_reduce_base"
BOUND = 2e-2


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def _calls() -> dict[str, int]:
    """Return how often each fused operator was called since this was last asked."""
    from mindspeed_model_core.testing.npu_emulator.operators import CALLS

    names = [call.name.partition(".")[0] for call in CALLS]
    del CALLS[:]
    return {name: names.count(name) for name in names}


def _product(
    name: str, shape: tuple[int, int], dtype: torch.dtype, tokens: int, chunks: int, level: int
) -> tuple[dict[str, int], dict[str, Tensor], dict[str, Tensor]]:
    """Return an op's calls, its value and gradients, and those of the whole product of all ranks in fp64."""
    group: Any = dist.group.WORLD
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), torch.device("npu", dist.get_rank())
    column, shared = name in COLUMNS, name in SHARED
    out, width = shape

    def mine(t: Tensor, dim: int, cut: bool = True) -> Tensor:
        here = t.shape[dim] // ranks
        return t.detach().narrow(dim, rank * here, here) if cut else t.detach()

    x = draw(ranks * tokens, 2, width if column else ranks * width, dtype=dtype).double().requires_grad_()
    weight = draw(out * ranks if column else out, x.shape[-1], seed=1, dtype=dtype).double().requires_grad_()
    y = torch.nn.functional.linear(x, weight)
    grad = draw(*y.shape, seed=2, dtype=dtype).double()
    y.backward(grad)
    dims = (0, 0, -1) if column else (-1, 1, 0)
    cuts = (shared, True, True) if column else (True, True, shared)
    wanted = {
        key: mine(t, dim, cut)  # type: ignore[arg-type]
        for key, t, dim, cut in zip(("x", "weight", "value"), (x.grad, weight.grad, y), dims, cuts, strict=True)
    }
    here = [mine(t, dim, cut).to(device, dtype) for t, dim, cut in zip((x, weight, grad), dims, cuts, strict=True)]
    ours, held = here[0].requires_grad_(), here[1].requires_grad_()
    _calls()
    with ops.at_level(level):
        value = getattr(ops, name)(ours, held, *((None,) if column else ()), group, chunks=chunks)
        value.backward(here[2])
    found = {"x": ours.grad, "weight": held.grad, "value": value.detach()}
    return _calls(), {key: t.cpu().double() for key, t in found.items()}, wanted  # type: ignore[union-attr]


BF16, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
FUSED: dict[str, dict[str, int]] = {
    "column_matmul": {},
    "all_gather_matmul": {GATHER: 1, SCATTER: 1},
    "matmul_all_reduce": {},  # CANN documents its operator for inference alone
    "matmul_reduce_scatter": {SCATTER: 1, GATHER: 1},
}
OTHERS: list[tuple[tuple[int, int], torch.dtype, int, int, int, tuple[str, ...]]] = [
    # weight's share, type, tokens, chunks, level, what is fused all the same
    ((256, 256), BF16, 5, 1, 2, tuple(FUSED)),
    ((260, 300), HALF, 1, 4, 2, tuple(FUSED)),  # chunks are for what is not fused
    ((256, 256), BF16, 5, 2, 1, ()),
    ((256, 256), BF16, 5, 1, 0, ()),
    ((256, 256), SINGLE, 5, 4, 2, ()),
    ((256, 255), BF16, 5, 2, 2, ()),
    ((255, 256), BF16, 5, 1, 2, ()),
    ((256, 256), BF16, 0, 2, 2, ()),
]


def _products() -> list[str]:
    wrong = []
    for name, calls in FUSED.items():
        for *how, fused in OTHERS:
            made, found, wanted = _product(name, *how)  # type: ignore[arg-type]
            said = f"{name} {how}"
            if made != (calls if name in fused else {}):
                wrong.append(f"{said}: calls {made}")
            try:
                assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in wanted.items()}
                if how[2]:
                    assert_close(found, wanted, BOUND)
            except AssertionError as error:
                wrong.append(f"{said}: {error}")
    return wrong


def test_products_with_their_collectives_are_fused_where_cann_takes_them() -> None:
    for wrong in run_on("npu", _products, 2):
        assert not wrong, "\n".join(wrong)


def _inference() -> tuple[dict[str, int], Tensor, Tensor]:
    rank, device = dist.get_rank(), torch.device("npu", dist.get_rank())
    x, weight = draw(5, 512), draw(6, 512, seed=1)
    here = [t.narrow(1, 256 * rank, 256).contiguous().to(device).requires_grad_() for t in (x, weight)]
    _calls()
    with torch.no_grad():
        value = ops.matmul_all_reduce(*here, dist.group.WORLD)
    return _calls(), value.cpu(), x.double() @ weight.double().T


def test_a_sum_over_ranks_is_fused_where_nothing_is_learnt() -> None:
    for calls, found, wanted in run_on("npu", _inference, 2):
        assert calls == {REDUCE: 1}
        assert_close({"y": found}, {"y": wanted}, BOUND)


CONFIG = toy.ToyConfig(blocks=2, width=256, hidden=512, aside=512)
LAYERS = 2 * 3 + 1  # up, down and side of two blocks, and the head, whose share of the vocabulary is narrow
ROWS, STEPS, BATCHES = 10, 3, 2


def _train(kind: str, layout: dict[str, Any]) -> tuple[dict[str, int], list[float], Pieces]:
    """Return the fused calls, the losses of a few descents and the first gradients of a wide network in bf16."""
    device = torch.device(kind, dist.get_rank()) if kind == "npu" else torch.device("cpu")
    config = ParallelConfig(**layout)
    mesh = open_mesh(config, device)
    with torch.device("meta"):
        net = toy.Toy(CONFIG)
    made = apply.parallelize(net, mesh, config, precision="bf16")
    for number, shard in enumerate(made.shards.values()):
        vector = len(shard.shape) == 1
        values = draw(*shard.shape, seed=number).float() * (0.1 if vector else shard.shape[-1] ** -0.5) + vector
        shard.write(shard.placement.narrow(values, shard.tp_rank, shard.tp).to(device))
    losses, first = [], {}
    if kind == "npu":
        _calls()
    for step in range(STEPS):
        batches = [
            {key: value.to(device) for key, value in toy.batch(BATCHES * step + i, rows=ROWS).items()}
            for i in range(BATCHES)
        ]
        loss = pipeline.run(made, batches, lambda out, _: out.sum(), torch.tensor(float(ROWS), device=device))
        losses.append(float(loss))
        made.gradients.reduce()
        for name, shard in made.shards.items():
            gradient = shard.gradient
            assert gradient is not None and gradient.dtype == torch.float32
            if step == 0:
                first[name] = [(at, gradient[here].cpu().clone()) for at, here in shard.rectangles()]
            shard.master.sub_(gradient, alpha=1e-3)
            shard.publish()
        made.gradients.clear()
    return _calls() if kind == "npu" else {}, losses, first


@pytest.mark.parametrize(
    ("layout", "fused"),
    [
        ({"tp": 2}, {}),
        # each of the layers of the blocks has one in forward, the other in backward; the head does it plainly
        ({"tp": 2, "sequence": True}, {GATHER: 2 * 3, SCATTER: 2 * 3}),
        ({"tp": 2, "sequence": True, "overlap_chunks": 2}, {GATHER: 2 * 3, SCATTER: 2 * 3}),
    ],
    ids=str,
)
def test_training_calls_them_and_learns_as_the_cpu_does(layout: dict[str, Any], fused: dict[str, int]) -> None:
    (_, want, pieces), *_ = run_on("cpu", _train, 1, "cpu", {})
    spread = run_on("npu", _train, 2, "npu", layout)
    for calls, losses, _ in spread:
        mc2 = {name: number for name, number in calls.items() if name in (GATHER, SCATTER, REDUCE)}
        assert mc2 == {name: STEPS * BATCHES * number for name, number in fused.items()}
        assert calls["npu_grouped_matmul_add_"] == STEPS * BATCHES * LAYERS
        assert all(abs(a - b) <= BOUND * abs(b) for a, b in zip(losses, want, strict=True)), (losses, want)
    assert want[-1] < want[0]
    got = whole([found for *_, found in spread], pieces)
    assert_close(got, {name: part[0][1] for name, part in pieces.items()}, 5e-2)
