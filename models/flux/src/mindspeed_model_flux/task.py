"""Rectified flow on images: predict the velocity from latents, text, the strength of guidance and a reference."""

from __future__ import annotations

import math
from typing import Literal

import torch
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.flow import FlowConfig, FlowTask, Noised
from mindspeed_model_core.recipe import Recipe
from mindspeed_model_core.task import Loader, Unit, Work
from mindspeed_model_core.trunk import Batch
from pydantic import Field

from .config import PATCH, FluxConfig
from .data import VAE, FluxData, open_data, synthetic_data
from .encoders import Encoders
from .model import FREQUENCIES

GUIDANCE = 1.0


class FluxFlow(FlowConfig):
    """The noise levels training draws from: uniform ones that all weigh the same, unless said otherwise."""

    shift: float = Field(1.0, gt=0, description="1: uniform levels; more: towards noise")
    weighting: Literal["gaussian", "none"] = Field("none", description="weight of a level in the loss")


class FluxRecipe(Recipe):
    """A FLUX.1 training recipe."""

    data: FluxData = FluxData()
    flow: FluxFlow = FluxFlow()
    guidance: float = Field(GUIDANCE, ge=0, description="the strength of guidance that the network is told in training")


class RectifiedFlow(FlowTask):
    """Rectified flow on latents of images, whose levels of noise all weigh the same."""

    unit: Unit = "frames"
    encoders = Encoders

    def __init__(self, recipe: FluxRecipe, config: FluxConfig) -> None:
        super().__init__(recipe, config)
        if recipe.guidance != GUIDANCE and not config.guidance_embeds:
            raise UserError(f"guidance={recipe.guidance:g}: this network (schnell) is told none; leave it out")

    def open(self, rank: int, ranks: int) -> Loader:
        """Open the recipe's images, or what was prepared of them, for one data rank."""
        return open_data(self.recipe, self.config, rank, ranks)

    def synthetic(self, rank: int, ranks: int) -> Loader:
        """Return random latents and texts of the recipe's size."""
        return synthetic_data(self.recipe, self.config, rank, ranks)

    def encoded(self, encoders: Encoders, batch: Batch) -> Batch:
        """Encode images, captions and references."""
        return encoders.batch(batch, self.recipe.data.text_tokens)

    def inputs(self, noised: Noised, batch: Batch) -> Batch:
        """Return noisy latents, time, texts, the strength of guidance and for Kontext the reference."""
        read = {"x": noised.x, "time": noised.time, "text": batch["text"], "pooled": batch["pooled"]}
        if self.config.guidance_embeds:
            read["guidance"] = torch.full_like(noised.time, self.recipe.guidance)
        if self.config.kontext:
            read["reference"] = batch["reference"]
        return read

    def work(self, batch: Batch) -> Work:
        """Return samples, as many frames, and training FLOPs, those of the network alone."""
        samples = self.count(batch)
        if "video" in batch:
            images = math.prod(batch["video"].shape[-2:]) // (VAE * PATCH) ** 2
            texts, reference = self.recipe.data.text_tokens, images if "reference" in batch else 0
        else:
            images = math.prod((batch["x"] if "x" in batch else batch["latents"]).shape[2:]) // PATCH**2
            reference = math.prod(batch["reference"].shape[2:]) // PATCH**2 if "reference" in batch else 0
            texts = batch["text"].shape[1]
        flops = forward_flops(self.config, texts, images, reference)
        return Work(samples, samples, self.recipe.passes * samples * flops)


def forward_flops(config: FluxConfig, texts: int, images: int, reference: int = 0) -> float:
    """Return the multiply-adds, times two, of one forward pass over one sample of so many tokens."""
    d, images = config.width, images + reference
    tokens = texts + images
    # Four projections of attention and two of the feed-forward, four times as wide; scores and values.
    block = 24 * tokens * d * d + 4 * tokens**2 * d
    blocks = (config.num_layers + config.num_single_layers) * block
    modulations = 2 * d * d * (12 * config.num_layers + 3 * config.num_single_layers + 2)
    ends = 4 * images * d * config.in_channels + 2 * texts * d * config.joint_attention_dim
    vectors = [FREQUENCIES, config.pooled_projection_dim] + [FREQUENCIES] * config.guidance_embeds
    return float(blocks + modulations + ends + sum(2 * d * (inputs + d) for inputs in vectors))
