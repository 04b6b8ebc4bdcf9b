"""Flow matching on videos: predict the velocity from latents, text and, for image-to-video, the given frames."""

from __future__ import annotations

import math

import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core.flow import FlowConfig, FlowTask, Noised
from mindspeed_model_core.recipe import Recipe
from mindspeed_model_core.task import Loader, Work
from mindspeed_model_core.trunk import Batch

from .config import Wan21Config
from .data import WanData, given_mask, open_data, synthetic_data
from .encoders import Encoders
from .model import TEXT_TOKENS


class Wan21Recipe(Recipe):
    """A Wan2.1 training recipe."""

    data: WanData = WanData()
    flow: FlowConfig = FlowConfig()


class FlowMatching(FlowTask):
    """Flow matching on latents of videos."""

    encoders = Encoders

    def open(self, rank: int, ranks: int) -> Loader:
        """Open the recipe's videos, or what was prepared of them, for one data rank."""
        return open_data(self.recipe, self.config, rank, ranks)

    def synthetic(self, rank: int, ranks: int) -> Loader:
        """Return random latents and texts of the recipe's size."""
        return synthetic_data(self.recipe, self.config, rank, ranks)

    def encoded(self, encoders: Encoders, batch: Batch) -> Batch:
        """Encode videos, captions and the frames that are given."""
        return encoders.batch(batch, self.config.conditioning)

    def inputs(self, noised: Noised, batch: Batch) -> Batch:
        """Return noisy latents, time and text, and for image-to-video the given frames, in ``x`` and to CLIP."""
        x = noised.x
        if self.config.image_dim is not None:
            mask = devices.send(given_mask(x.shape[2:], self.config).to(x.dtype), x.device)
            x = torch.cat((x, mask.expand(len(x), *mask.shape), batch["condition"].to(x)), 1)
        image = {"image": batch["image"]} if "image" in batch else {}
        return {"x": x, "time": noised.time, "text": batch["text"], **image}

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
