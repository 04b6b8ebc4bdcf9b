"""The objective against its formulas, FLOPs and first weights: what no comparison of a network with itself notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mindspeed_model_core import recipe as recipes
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.estimate import estimate
from mindspeed_model_core.parallel import apply
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.recipe import ParallelConfig
from mindspeed_model_flux import MODEL
from mindspeed_model_flux.task import FluxRecipe, RectifiedFlow, forward_flops


def task(**changes: Any) -> RectifiedFlow:
    fields = {"preset": "tiny", "data": {"synthetic": (64, 96), "text_tokens": 16}, "global_batch": 2}
    recipe = FluxRecipe(**{**fields, **changes})
    return RectifiedFlow(recipe, MODEL.config(recipe))


def test_a_batch_is_noised_sample_by_sample_and_told_of_guidance() -> None:
    """Each sample has a level of its own, decided by its seed, whatever shares its micro-batch; all weigh one."""
    each = task(guidance=3.5)
    raw = {
        "latents": torch.randn(3, 16, 4, 4),
        "text": torch.randn(3, 16, 32),
        "pooled": torch.randn(3, 24),
        "seeds": (5, 6, 7),
    }
    batch = each.encode(raw)
    sigma = batch["time"] / 1000
    assert sigma.unique().numel() == 3 and bool(((sigma > 0) & (sigma <= 1)).all())
    s = sigma.view(3, 1, 1, 1)
    # x = (1 - s) x0 + s e and v = e - x0, so x0 = x - s v.
    torch.testing.assert_close(batch["x"] - s * batch["velocity"], raw["latents"], atol=1e-5, rtol=1e-5)
    alone = each.encode({**{name: raw[name][1:2] for name in ("latents", "text", "pooled")}, "seeds": (6,)})
    for name in ("x", "time", "velocity"):
        assert torch.equal(alone[name][0], batch[name][1]), name
    assert batch["guidance"].tolist() == [3.5] * 3 and batch["weight"].tolist() == [1.0] * 3
    output = torch.randn(batch["velocity"].shape)
    by_hand = sum(((o - v) ** 2).mean() for o, v in zip(output, batch["velocity"], strict=True))
    torch.testing.assert_close(each.loss(output, batch), torch.as_tensor(by_hand))
    assert each.count(batch) == 3
    assert "guidance" not in task(config={"guidance_embeds": False}).encode(raw)
    with pytest.raises(UserError, match=r"^guidance=3.5: this network \(schnell\) is told none; leave it out$"):
        task(guidance=3.5, config={"guidance_embeds": False})


@pytest.mark.parametrize("density", ["uniform", "logit-normal"])
def test_levels_are_those_of_the_unshifted_grid(density: str) -> None:
    """As diffusers' training scripts draw them: a place among 1000, and its level 1 - place / 1000."""
    count = 4000
    empty = {"latents": torch.zeros(count, 1, 2, 2), "text": torch.zeros(count, 1, 1), "pooled": torch.zeros(count, 1)}
    times = task(flow={"density": density}).encode({**empty, "seeds": tuple(range(count))})["time"]
    assert (times - times.round()).abs().max() < 1e-3 and times.min() >= 1 and times.max() <= 1000
    logits = torch.logit((times / 1000).clamp(1e-3, 1 - 1e-3))
    if density == "uniform":
        assert abs(times.mean() - 500) < 15 and abs(times.std() - 1000 / 12**0.5) < 10
    else:
        assert abs(logits.mean()) < 0.05 and abs(logits.std() - 1) < 0.05


@pytest.mark.parametrize(
    ("size", "texts", "kontext", "tera"),
    [(512, 77, False, 15.07), (512, 512, False, 21.50), (1024, 512, False, 74.38), (1024, 512, True, 165.46)],
)
def test_flops_are_those_of_the_published_sizes(size: int, texts: int, kontext: bool, tera: float) -> None:
    """Counted apart from this formula, over diffusers' network."""
    images = (size // 16) ** 2
    flops = forward_flops(MODEL.presets["dev"], texts, images, images if kontext else 0)
    assert abs(flops / 1e12 / tera - 1) < 1e-3


def test_adapters_need_no_gradient_of_frozen_weights() -> None:
    batch = next(iter(task().synthetic(0, 1)))[0]
    adapters = task(lora={"rank": 4}).work(batch).flops
    assert adapters == pytest.approx(2 / 3 * task().work(batch).flops)


@pytest.mark.parametrize("kontext", [False, True])
def test_synthetic_batches_have_the_recipes_shape(kontext: bool) -> None:
    each = task(config={"kontext": kontext})
    batch = each.encode(next(iter(each.synthetic(0, 1)))[0])
    assert batch["x"].shape == (1, 16, 8, 12) and batch["text"].shape == (1, 16, 32)
    assert batch["pooled"].shape == (1, 24) and ("reference" in batch) == kontext
    assert not kontext or batch["reference"].shape == batch["x"].shape


def test_first_weights_make_blocks_that_add_nothing() -> None:
    with torch.device("meta"):
        net = MODEL.build(MODEL.presets["tiny"])
    made = apply.parallelize(net, Mesh(torch.device("cpu")), ParallelConfig())
    apply.initialise(made, seed=0)
    held = {name: shard.master for name, shard in made.shards.items()}

    def xavier(name: str, rows: slice, outputs: int, inputs: int) -> None:
        bound = (6 / (outputs + inputs)) ** 0.5
        assert bound * 0.98 < held[name][rows].abs().max() <= bound, name

    for name, parameter in held.items():
        if name.endswith("bias") or "modulation" in name or name.startswith("head."):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.startswith(("time.", "guidance.", "pooled.")):
            assert 0.015 < parameter.std() < 0.025, name
    xavier("blocks.0.attention.text_qkv.weight", slice(64, 128), 64, 64)
    xavier("blocks.2.qkv_up.weight", slice(64), 64, 64)
    xavier("blocks.2.qkv_up.weight", slice(192, None), 256, 64)
    batch = task().encode(next(iter(task().synthetic(0, 1)))[0])
    context = net.context(batch)
    state = net.embed(batch, context)
    for index, block in enumerate(net.blocks):
        assert torch.equal(net.step(index, block, state, context)["x"], state["x"])


def test_the_estimate_knows_both_kinds_of_blocks() -> None:
    """A block of two streams keeps more than one of one stream, wherever it is counted."""

    def kept(double: int, single: int) -> int:
        recipe = task(config={"num_layers": double, "num_single_layers": single}).recipe
        return estimate(recipe, MODEL, 1).memory.activations

    each = {"double": kept(3, 2) - kept(2, 2), "single": kept(2, 3) - kept(2, 2)}
    assert each["double"] > each["single"] > 0
    assert kept(4, 5) == kept(2, 2) + 2 * each["double"] + 3 * each["single"]


@pytest.mark.parametrize("parallel", [{"tp": 2, "cp": 2, "sequence": True}, {"cp": 2}, {"tp": 2}], ids=str)
def test_the_estimate_knows_every_layout(parallel: dict[str, Any]) -> None:
    """What ranks share out, they keep less of; modulations are shared out as well."""
    world = parallel.get("tp", 1) * parallel.get("cp", 1)
    alone, spread = (
        estimate(task(parallel=fields, config={"kontext": True}).recipe, MODEL, count).memory
        for fields, count in (({}, 1), (parallel, world))
    )
    assert spread.activations < 0.8 * alone.activations
    assert spread.weights < (0.6 if "tp" in parallel else 1.01) * alone.weights


def test_recipes_have_the_published_settings() -> None:
    """MindSpeed-MM's: batch of 16 on each of 8 devices, four of them a step; 2 in a step of Kontext."""
    for name in recipes.names(MODEL.package):
        recipe = MODEL.load_recipe(name)
        if name.startswith("tiny"):
            continue
        optim = recipe.optim
        assert (optim.betas, optim.weight_decay, optim.clip, optim.schedule) == ((0.9, 0.999), 1e-4, 1.0, "constant")
        assert optim.lr == (1e-4 if name == "dev-lora" else 1e-5) and recipe.guidance == 1.0, name
        assert recipe.parallel.shard == "zero2" and recipe.recompute == "all"
    dev, kontext = (MODEL.load_recipe(name) for name in ("dev-256", "kontext-1024"))
    assert (dev.micro_batch, dev.global_batch, dev.data.synthetic) == (16, 16 * 8 * 4, (256, 256))
    assert (kontext.micro_batch, kontext.global_batch, kontext.data.synthetic) == (2, 2 * 8, (1024, 1024))
