"""FLUX.1's data: images with captions, or what was encoded of them, in buckets of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from mindspeed_model_core.data import SlotLoader
from mindspeed_model_core.data.clips import Clips, PictureData, Reader, Sample, check_sides, open_reader
from mindspeed_model_core.data.encoded import PreparedFeatures, RandomFeatures, open_prepared
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import Recipe
from mindspeed_model_core.trunk import Batch
from pydantic import Field, PositiveInt, model_validator

from .config import PATCH, FluxConfig
from .encoders import NEEDED

VAE = 8
"""Pixels along a side that come to one latent."""


class FluxData(PictureData):
    """Which images the network learns from, and the shapes they are brought to."""

    stride: ClassVar[int] = VAE * PATCH
    encoder_parts: ClassVar[tuple[str, ...]] = NEEDED

    height: int = Field(1024, description="pixels of what is trained on")
    width: int = Field(1024, description="pixels of what is trained on")
    text_tokens: PositiveInt = Field(512, le=512, description="tokens of T5 that every caption is cut or filled up to")
    synthetic: tuple[PositiveInt, PositiveInt] = Field(
        (1024, 1024), description="height and width of measure's random batches"
    )

    @model_validator(mode="after")
    def _check_synthetic(self) -> FluxData:
        check_sides({f"synthetic[{i}]": side for i, side in enumerate(self.synthetic)}, self.stride)
        return self

    @property
    def shapes(self) -> dict[str, Any]:
        """Return, for JSON, the fields that decide what is read of a file."""
        return {**super().shapes, "text_tokens": self.text_tokens}


def names(config: FluxConfig) -> tuple[str, ...]:
    """Return the features that the network takes."""
    return ("latents", "text", "pooled", *(("reference",) if config.kontext else ()))


def open_data(recipe: Recipe, config: FluxConfig, rank: int, ranks: int) -> SlotLoader:
    """Return the loader of a recipe's data for one data rank; see ``BucketSource`` for the order.

    Of images a batch holds ``video`` uint8 ``[B, 1, 3, H, W]``, ``captions`` and for Kontext ``reference`` as ``video``
    is; of features ``latents`` ``[B, channels, h, w]``, ``text`` ``[B, tokens, width]``, ``pooled`` ``[B, width]`` and
    for Kontext ``reference`` as ``latents`` are. Both have ``seeds``, one number a sample, the same under every layout.
    Raises UserError for data that cannot be read or is not what the network takes.
    """
    data: FluxData = recipe.data  # type: ignore[attr-defined]
    kind, path = data.source()
    reader: Reader
    if kind == "prepared":
        check, features = partial(_check_shapes, config), open_prepared(path)
        if features.meta.get("pairs") and not config.kontext:
            raise UserError(
                f"{path}: was prepared with --pairs, and this network takes no reference; set preset=kontext or "
                "config.kontext=true"
            )
        reader = PreparedFeatures(features, data, collate, names=names(config), check=check)
    elif kind == "raw":
        reader = Clips(path, data, references=config.kontext)
    else:
        raise UserError(f"data.path={path}: lists feature files; give a list of images, or a prepared folder")
    return open_reader(reader, recipe, rank, ranks, workers=data.workers)


def synthetic_data(recipe: Recipe, config: FluxConfig, rank: int, ranks: int) -> SlotLoader:
    """Return the loader of random features of the recipe's synthetic shape."""
    data: FluxData = recipe.data  # type: ignore[attr-defined]
    latents = (config.channels, *(side // VAE for side in data.synthetic))
    shapes: dict[str, tuple[int, ...]] = {
        "latents": latents,
        "text": (data.text_tokens, config.joint_attention_dim),
        "pooled": (config.pooled_projection_dim,),
    }
    if config.kontext:
        shapes["reference"] = latents
    return open_reader(RandomFeatures(shapes, collate), recipe, rank, ranks)


def collate(samples: list[Sample]) -> Batch:
    """Return a micro-batch of features: images in fp32, texts as they are."""
    batch: Batch = {
        name: torch.stack([s[name].float() for s in samples]) for name in ("latents", "reference") if name in samples[0]
    }
    batch |= {name: torch.stack([s[name] for s in samples]) for name in ("text", "pooled")}
    batch["seeds"] = tuple(s["seed"] for s in samples)
    return batch


def _check_shapes(config: FluxConfig, where: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless a sample's features are as wide as what the network takes."""
    wanted = {
        "latents": (3, 0, config.channels, "channels, rows and columns"),
        "text": (2, 1, config.joint_attention_dim, "tokens, of so many elements"),
        "pooled": (1, 0, config.pooled_projection_dim, "elements"),
        "reference": (3, 0, config.channels, "channels, rows and columns"),
    }
    for name in names(config):
        dims, dim, size, what = wanted[name]
        if name not in shapes:
            hint = "prepare it with --pairs, or set config.kontext=false" if name == "reference" else "prepare it again"
            raise UserError(f"{where}: has no {name!r}, which the network takes; {hint}")
        if len(shapes[name]) != dims or shapes[name][dim] != size:
            raise UserError(
                f"{where}: {name!r} is {list(shapes[name])}, the network takes {size} along dim {dim} of {dims} "
                f"({what}); encode the images with the encoders that go with it"
            )
        if dims == 3 and any(side % PATCH for side in shapes[name][1:]):
            raise UserError(
                f"{where}: {name!r} is {list(shapes[name])}, rows and columns must be even; encode images whose sides "
                f"are multiples of {VAE * PATCH}"
            )
    if config.kontext and shapes["reference"] != shapes["latents"]:
        raise UserError(f"{where}: 'reference' is {list(shapes['reference'])}, 'latents' {list(shapes['latents'])}")
