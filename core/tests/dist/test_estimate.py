"""The memory estimate against what real ranks hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import lora
from mindspeed_model_core.estimate import Fused, Saved, estimate
from mindspeed_model_core.parallel import apply
from mindspeed_model_core.parallel.mesh import open_mesh
from mindspeed_model_core.testing import toy
from mindspeed_model_core.testing.dist import run_dist
from mindspeed_model_core.train import Session


def held(fields: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes of AdamW's states and, if this rank has all blocks whole, what is kept before the head."""
    recipe = toy.recipe(**fields)
    mesh = open_mesh(recipe.parallel, torch.device("cpu"))
    with torch.device("meta"):
        net = toy.Toy(toy.ToyConfig())
    if recipe.lora is not None:
        lora.attach(net, recipe.lora)
    parallel = apply.parallelize(net, mesh, recipe.parallel, precision=recipe.precision)
    states = 0
    for shard in (s for s in parallel.shards.values() if s.trainable):
        apart = shard.sharded or shard.master.data_ptr() != shard.local.data_ptr()
        states += shard.master.nbytes * (3 if apart else 2)
    if parallel.config.shard != "none" or recipe.parallel.pp > 1:
        return states, 0
    batch = toy.batch(1)
    net.to(apply.COMPUTE[recipe.precision])
    with Fused(), Saved([*net.parameters(), *batch.values()]) as saved:
        state = net.embed(batch, {})
        if recipe.lora is not None:
            # The estimate takes every block to be like the others; behind a frozen embedding the first keeps less.
            state = {name: value.detach().requires_grad_() for name, value in state.items()}
        for index, block in enumerate(net.blocks):
            state = net.step(index, block, state, {})
    return states, saved.bytes


@pytest.mark.parametrize(
    ("world", "fields"),
    [
        (1, {}),
        (2, {"parallel": {"tp": 2}}),
        (2, {"parallel": {"tp": 2, "sequence": True}}),
        (2, {"precision": "bf16"}),
        (2, {"precision": "bf16", "parallel": {"shard": "zero1"}}),
        (2, {"parallel": {"shard": "zero3"}}),
        (4, {"precision": "bf16-pure", "parallel": {"tp": 2, "shard": "zero2"}}),
        (2, {"parallel": {"pp": 2}}),
        (1, {"precision": "bf16", "lora": {"rank": 2, "dropout": 0.5}}),
        (2, {"lora": {"rank": 2}, "parallel": {"tp": 2}}),
        (2, {"lora": {"rank": 2, "dropout": 0.5}, "parallel": {"tp": 2, "sequence": True}}),
        (2, {"precision": "bf16", "lora": {"rank": 2}, "parallel": {"shard": "zero2"}}),
    ],
    ids=str,
)
def test_equals_what_ranks_hold(world: int, fields: dict[str, Any]) -> None:
    memory = estimate(toy.recipe(**fields), toy.TOY, world).memory
    ranks = run_dist(held, world, fields) if world > 1 else [held(fields)]
    assert memory.optimizer == max(states for states, _ in ranks)
    kept = {saved for _, saved in ranks}
    assert kept <= {0, memory.activations}


def _losses(recompute: str | int) -> tuple[int, list[float]]:
    recipe = toy.recipe(recompute=recompute, global_batch=4)
    mesh = open_mesh(recipe.parallel, torch.device("cpu"))
    # Enough for none on one rank, for nothing on the other.
    devices.free_memory = lambda _: 2**40 if mesh.rank == 0 else 0
    session = Session(recipe, toy.TOY, mesh, synthetic=True)
    session.start()
    return session.parallel.net.recompute, [session.step().read()[0] for _ in range(3)]


def test_all_ranks_recompute_what_the_fullest_device_asks_for() -> None:
    found, none = run_dist(_losses, 2, "auto"), run_dist(_losses, 2, "none")
    assert [blocks for blocks, _ in found] == 2 * [toy.ToyConfig().blocks]
    assert [losses for _, losses in found] == [losses for _, losses in none]
