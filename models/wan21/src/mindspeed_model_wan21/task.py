"""Flow matching on videos: predict the velocity from latents, text and, for image-to-video, the given frames."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core.flow import FlowConfig, add_noise, velocity_loss
from mindspeed_model_core.frozen import check_parts
from mindspeed_model_core.recipe import Recipe
from mindspeed_model_core.task import Loader, Unit, Work
from mindspeed_model_core.trunk import Batch
from torch import Tensor

from .config import Wan21Config
from .data import WanData, given_mask, open_data, synthetic_data
from .encoders import NEEDED
from .model import TEXT_TOKENS


class Wan21Recipe(Recipe):
    """A Wan2.1 training recipe."""

    data: WanData = WanData()
    flow: FlowConfig = FlowConfig()


class FlowMatching:
    """Predict ``noise - latents`` at a random noise level; each sample counts once, with its own level's weight."""

    unit: Unit = "samples"

    def __init__(self, recipe: Wan21Recipe, config: Wan21Config) -> None:
        self.recipe, self.config = recipe, config

    def data(self, rank: int, ranks: int) -> Loader:
        """Open the recipe's videos, or what was prepared of them, for one data rank."""
        if self.recipe.data.encoders is not None:
            # Features need none, but what is exported of the run has them from there.
            check_parts(self.recipe.data.encoders, NEEDED, "data.encoders=")
        return open_data(self.recipe, self.config, rank, ranks)

    def synthetic(self, rank: int, ranks: int) -> Loader:
        """Return random latents and texts of the recipe's size."""
        return synthetic_data(self.recipe, self.config, rank, ranks)

    def encode(self, batch: Batch) -> Batch:
        """Encode videos and captions if they are not yet, then add noise, and for image-to-video the given frames."""
        if "video" in batch:
            batch = self._encoders(batch["video"].device).batch(batch, self.config.conditioning)
        noised = add_noise(batch["latents"], batch["seeds"], self.recipe.flow)
        x = noised.x
        if self.config.image_dim is not None:
            mask = devices.send(given_mask(x.shape[2:], self.config).to(x.dtype), x.device)
            x = torch.cat((x, mask.expand(len(x), *mask.shape), batch["condition"].to(x)), 1)
        image = {"image": batch["image"]} if "image" in batch else {}
        return {
            "x": x,
            "time": noised.time,
            "text": batch["text"],
            **image,
            "velocity": noised.velocity,
            "weight": noised.weight,
        }

    @functools.cache  # noqa: B019  (a task lives as long as its run)
    def _encoders(self, device: torch.device) -> Any:
        from .encoders import Encoders

        return Encoders(self.recipe.data.encoder_folder(self.recipe.init_from), device)

    def count(self, batch: Batch) -> int:
        """Return the number of samples."""
        return len(batch["seeds"]) if "seeds" in batch else len(batch["x"])

    def work(self, batch: Batch) -> Work:
        """Return samples and training FLOPs, those of the network alone."""
        config, samples = self.config, self.count(batch)
        if "video" in batch:
            frames, _, height, width = batch["video"].shape[1:]
            shape = ((frames - 1) // 4 + 1, height // 8, width // 8)
        else:
            shape = tuple((batch["x"] if "x" in batch else batch["latents"]).shape[2:])
        tokens = math.prod(size // patch for size, patch in zip(shape, config.patch_size, strict=True))
        images = batch["image"].shape[1] if "image" in batch else 0
        return Work(samples, samples, self.recipe.passes * samples * forward_flops(config, tokens, images))

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the sum over samples of the weighted mean squared error."""
        return velocity_loss(output, batch["velocity"], batch["weight"])


def forward_flops(config: Wan21Config, tokens: int, images: int = 0) -> float:
    """Return the multiply-adds, times two, of one forward pass over one sample of so many tokens."""
    d, text = config.width, TEXT_TOKENS
    block = 8 * tokens * d * d + 4 * tokens**2 * d  # self-attention: four projections, scores and values
    block += (4 * tokens + 4 * text) * d * d + 4 * tokens * text * d
    block += 4 * images * d * d + 4 * tokens * images * d
    block += 4 * tokens * d * config.ffn_dim
    patch = math.prod(config.patch_size)
    ends = 2 * tokens * d * patch * (config.in_channels + config.out_channels)
    ends += 2 * text * d * (config.text_dim + d) + 2 * d * (config.freq_dim + 7 * d)
    if config.image_dim:
        ends += 2 * images * config.image_dim * (config.image_dim + d)
    return float(config.num_layers * block + ends)
