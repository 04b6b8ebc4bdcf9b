"""The objective against its formulas, and the given frames' mask against diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core.errors import UserError
from mindspeed_model_wan21 import MODEL
from mindspeed_model_wan21.data import given_mask
from mindspeed_model_wan21.encoders import Encoders
from mindspeed_model_wan21.task import FlowMatching, Wan21Recipe, forward_flops
from mindspeed_model_wan21.tiny import write_tiny_encoders


def task(preset: str = "tiny-t2v", **changes: Any) -> FlowMatching:
    recipe = Wan21Recipe(**{"preset": preset, "data": {"synthetic": (9, 48, 80)}, "global_batch": 2, **changes})
    return FlowMatching(recipe, MODEL.config(recipe))


def test_a_batch_is_noised_and_weighed_sample_by_sample() -> None:
    """Each sample has its own level and weight, decided by its seed, whatever shares its micro-batch."""
    each = task()
    raw = {"latents": torch.randn(3, 16, 2, 4, 4), "text": torch.randn(3, 512, 32), "seeds": (5, 6, 7)}
    batch = each.encode(raw)
    sigma = batch["time"] / 1000
    assert sigma.unique().numel() == 3 and bool(((sigma > 0) & (sigma <= 1)).all())
    s = sigma.view(3, 1, 1, 1, 1)
    # x = (1 - s) x0 + s e and v = e - x0, so x0 = x - s v.
    torch.testing.assert_close(batch["x"] - s * batch["velocity"], raw["latents"], atol=1e-5, rtol=1e-5)
    alone = each.encode({"latents": raw["latents"][1:2], "text": raw["text"][1:2], "seeds": (6,)})
    for name in ("x", "time", "velocity", "weight"):
        assert torch.equal(alone[name][0], batch[name][1]), name
    output = torch.randn(batch["velocity"].shape)
    by_hand = sum(w * ((o - v) ** 2).mean() for w, o, v in zip(batch["weight"], output, batch["velocity"], strict=True))
    torch.testing.assert_close(each.loss(output, batch), torch.as_tensor(by_hand))
    assert each.count(batch) == 3


def test_a_folder_of_encoders_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Before training, though features need none: a run's export takes them from there."""
    for field, said in (
        (tmp_path / "gone", "no such folder"),
        (tmp_path, "no vae/ there; .* vae/, text_encoder/, tok"),
    ):
        each = task(data={"path": str(tmp_path / "features"), "encoders": str(field)})
        with pytest.raises(UserError, match=f"data.encoders={field}: {said}"):
            each.data(0, 1)


def test_levels_and_weights_are_the_published_ones() -> None:
    """Over many seeds: the levels are the shifted grid's, and weights its bell of mean one."""
    many = task().encode(
        {"latents": torch.zeros(4000, 1, 1, 1, 1), "text": torch.zeros(4000, 1, 1), "seeds": tuple(range(4000))}
    )
    even = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    grid = 1000 * 5 * even / (1 + 4 * even)
    place = (many["time"].double()[:, None] - grid).abs().argmin(1)
    assert (many["time"] - grid[place]).abs().max() < 1e-3
    bell = torch.exp(-2 * ((grid - 500) / 1000) ** 2)
    bell = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    torch.testing.assert_close(many["weight"].double(), bell[place], atol=1e-5, rtol=1e-5)
    assert abs(place.float().mean() / 999 - 0.5) < 0.02 and place.unique().numel() > 900


@pytest.mark.parametrize("preset", ["tiny-i2v", "flf2v-14b"])
def test_image_to_video_is_given_noise_mask_and_condition(preset: str, tmp_path: Path) -> None:
    """In diffusers' order and with its mask, checked through its pipeline's own code."""
    from diffusers import WanImageToVideoPipeline

    config = MODEL.presets[preset]
    encoders = Encoders(write_tiny_encoders(tmp_path / "encoders"))
    frames, height, width = 9, 32, 48
    ends = torch.randn(2, 1, 3, height, width)
    pipeline = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=encoders.vae, scheduler=None, transformer=None
    )
    last = ends[1] if config.conditioning == "first-last" else None
    _, wanted = pipeline.prepare_latents(
        ends[0], 1, 16, height, width, frames, torch.float32, torch.device("cpu"), None, torch.zeros(1), last
    )
    mask = given_mask(torch.Size((3, height // 8, width // 8)), config)
    assert torch.equal(wanted[0, :4], mask)
    if preset == "tiny-i2v":
        latents = torch.randn(1, 16, 3, 4, 6)
        raw = {"latents": latents, "text": torch.zeros(1, 512, 32), "seeds": (1,), "image": torch.zeros(1, 5, 20)}
        x = task(preset).encode({**raw, "condition": wanted[:, 4:]})["x"]
        assert x.shape[1] == 36 and torch.equal(x[:, 16:], wanted)


@pytest.mark.parametrize(
    ("preset", "shape", "tera"),
    [
        ("t2v-1.3b", (81, 480, 832), 283.00),
        ("t2v-14b", (81, 480, 832), 1678.37),
        ("i2v-14b", (81, 480, 832), 1686.38),
        ("t2v-14b", (81, 720, 1280), 6523.44),
    ],
)
def test_flops_are_the_published_ones(preset: str, shape: tuple[int, int, int], tera: float) -> None:
    frames, height, width = shape
    tokens = ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
    config = MODEL.presets[preset]
    flops = forward_flops(config, tokens, 257 if config.image_dim else 0)
    assert abs(flops / 1e12 / tera - 1) < 2e-3


def test_adapters_need_no_gradient_of_frozen_weights() -> None:
    batch = next(iter(task().synthetic(0, 1)))[0]
    adapters = task(lora={"rank": 4}).work(batch).flops
    assert adapters == pytest.approx(2 / 3 * task().work(batch).flops)


def test_synthetic_batches_have_the_recipes_shape() -> None:
    for preset, images in (("tiny-t2v", 0), ("tiny-i2v", 257)):
        each = task(preset)
        batch = each.encode(next(iter(each.synthetic(0, 1)))[0])
        assert batch["x"].shape == (1, MODEL.presets[preset].in_channels, 3, 6, 10)
        assert batch["text"].shape == (1, 512, 32)
        assert ("image" in batch) == bool(images) and (not images or batch["image"].shape == (1, images, 20))
