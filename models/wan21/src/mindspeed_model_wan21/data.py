"""Wan2.1's data: videos and images with captions, or what was encoded of them, in buckets of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from mindspeed_model_core.data import SlotLoader
from mindspeed_model_core.data.clips import ClipData, Clips, Reader, Sample, open_reader
from mindspeed_model_core.data.encoded import FeatureFiles, PreparedFeatures, RandomFeatures, open_prepared
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import Recipe
from mindspeed_model_core.trunk import Batch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from .config import Wan21Config
from .encoders import NEEDED, TEXT_LENGTH, pad_text

_VAE = (4, 8, 8)  # its strides over frames, rows and columns
_PATCH = 2  # latents along a side that come to one token
_CLIP_TOKENS, _CLIP_WIDTH = 257, 1280  # of the published CLIP, for each given frame


class WanData(ClipData):
    """Which clips the network learns from, and the shapes they are brought to.

    ``path`` is a .jsonl or .csv list of clips and captions, a folder made by ``prepare``, or a .jsonl list of feature
    files (.pt) made by MindSpeed-MM. The shapes are the first's alone: features have theirs, and those set must agree.
    """

    frame_stride: ClassVar[int] = _VAE[0]
    stride: ClassVar[int] = _VAE[1] * _PATCH
    encoder_parts: ClassVar[tuple[str, ...]] = NEEDED

    height: int = Field(480, description="pixels of what is trained on")
    width: int = Field(832, description="pixels of what is trained on")
    frames: tuple[PositiveInt, ...] = Field((81,), description="lengths, 4n + 1; a clip gets the longest it fills")
    fps: PositiveFloat = Field(16.0, description="frames per second that clips are sampled at")
    synthetic: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (81, 480, 832), description="frames, height and width of measure's random batches"
    )


def open_data(recipe: Recipe, config: Wan21Config, rank: int, ranks: int) -> SlotLoader:
    """Return the loader of a recipe's data for one data rank; see ``BucketSource`` for the order.

    Of videos a batch holds ``video`` uint8 ``[B, F, 3, H, W]`` and ``captions``; of features ``latents``
    ``[B, z, T, h, w]``, ``text`` ``[B, 512, width]``, zero beyond each text, and for image-to-video ``image`` and
    ``condition``. Both have ``seeds``, one number a sample, the same under every layout. Raises UserError for data
    that cannot be read or is not what the network takes.
    """
    data: WanData = recipe.data  # type: ignore[attr-defined]
    kind, path = data.source()
    names = ("latents", "text") if config.conditioning == "none" else ("latents", "text", "image", "condition")
    check = partial(_check_shapes, config)
    reader: Reader
    if kind == "prepared":
        features = open_prepared(path)
        given = features.meta.get("conditioning", "none")
        if config.conditioning != "none" and given != config.conditioning:
            raise UserError(
                f"{path}: was prepared with --conditioning {given}, the network takes {config.conditioning}; "
                f"prepare it with --conditioning {config.conditioning}"
            )
        reader = PreparedFeatures(features, data, collate, names=names, check=check)
    elif kind == "files":
        reader = FeatureFiles(path, data, collate, load=partial(_load, config), check=check)
    else:
        if config.conditioning != "none" and 1 in data.frames:
            raise UserError(
                "data.frames=1: an image leaves nothing to predict when its frame is given; leave the length 1 out"
            )
        reader = Clips(path, data)
    return open_reader(reader, recipe, rank, ranks, workers=data.workers)


def synthetic_data(recipe: Recipe, config: Wan21Config, rank: int, ranks: int) -> SlotLoader:
    """Return the loader of random features of the recipe's synthetic shape."""
    frames, *sides = recipe.data.synthetic  # type: ignore[attr-defined]
    cut = [(frames - 1) // _VAE[0] + 1, *(side // stride for side, stride in zip(sides, _VAE[1:], strict=True))]
    latents = (config.out_channels, *cut)
    shapes: dict[str, tuple[int, ...]] = {"latents": latents, "text": (TEXT_LENGTH, config.text_dim)}
    if config.image_dim:
        tokens = {"none": 0, "first": _CLIP_TOKENS, "first-last": config.pos_embed_seq_len or 0}[config.conditioning]
        shapes |= {"image": (tokens, config.image_dim), "condition": latents}
    return open_reader(RandomFeatures(shapes, collate), recipe, rank, ranks)


def collate(samples: list[Sample]) -> Batch:
    """Return a micro-batch of features: texts padded with zeros, the rest stacked in fp32."""
    batch: Batch = {
        name: torch.stack([s[name].float() for s in samples])
        for name in ("latents", "image", "condition")
        if name in samples[0]
    }
    batch["text"] = pad_text([s["text"] for s in samples])
    batch["seeds"] = tuple(s["seed"] for s in samples)
    return batch


def given_mask(shape: torch.Size, config: Wan21Config) -> Tensor:
    """Return ``[mask channels, frames, height, width]``: which frames of a video with such latents are given.

    A latent frame's channels stand for the video frames it was made of; the first latent frame is made of one alone.
    """
    frames, height, width = shape
    mask = torch.zeros(config.mask_channels, frames)
    mask[:, 0] = 1
    if config.conditioning == "first-last":
        mask[-1, -1] = 1
    return mask[:, :, None, None].expand(-1, -1, height, width)


def _check_shapes(config: Wan21Config, where: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless a sample's features are as wide as what the network takes."""
    wanted = {"latents": (0, config.out_channels, "channels"), "text": (-1, config.text_dim, "columns")}
    if config.image_dim:
        wanted |= {"image": (-1, config.image_dim, "columns"), "condition": (0, config.out_channels, "channels")}
    for name, (dim, size, what) in wanted.items():
        if name not in shapes:
            raise UserError(f"{where}: has no {name!r}, which the network takes; encode the videos for it")
        if not shapes[name] or shapes[name][dim] != size:
            raise UserError(
                f"{where}: {name!r} is {list(shapes[name])}, the network takes {size} {what}; "
                "encode the videos with the encoders that go with it"
            )
    if "condition" in wanted and shapes["condition"] != shapes["latents"]:
        raise UserError(f"{where}: 'condition' is {list(shapes['condition'])}, 'latents' {list(shapes['latents'])}")
    if len(shapes["latents"]) != 4 or any(n % p for n, p in zip(shapes["latents"][1:], config.patch_size, strict=True)):
        raise UserError(
            f"{where}: 'latents' is {list(shapes['latents'])}, the network takes channels, frames, rows and columns in "
            f"multiples of {list(config.patch_size)}; encode clips whose sides are multiples of {_VAE[1] * _PATCH}"
        )
    tokens = _image_tokens(config)
    if "image" in wanted and tokens is not None and shapes["image"][0] != tokens:
        raise UserError(
            f"{where}: 'image' has {shapes['image'][0]} tokens, the network takes {tokens}: its conditioning is "
            f"{config.conditioning!r}; encode the videos for it"
        )


def _image_tokens(config: Wan21Config) -> int | None:
    """Return how many tokens the given frames come to; None for a CLIP that is not the published one."""
    if config.conditioning == "first-last":
        return config.pos_embed_seq_len
    return _CLIP_TOKENS if config.image_dim == _CLIP_WIDTH else None


def _load(config: Wan21Config, path: Path) -> dict[str, Tensor]:
    """Return the features of a MindSpeed-MM file under our names; nothing but tensors is unpickled."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        text, mask = (_only(held[name]) for name in ("prompt_ids", "prompt_mask"))
        found = {"latents": _sample(held["video"], 4), "text": _sample(text, 2)[: int(mask.sum())]}
        if config.conditioning != "none":
            found["image"] = _sample(held["i2v_clip_feature"], 2)
            given = _sample(held["i2v_vae_feature"], 4)
            given, found["condition"] = given.split((len(given) - len(found["latents"]), len(found["latents"])))
            if len(given) and not torch.equal(given.float(), given_mask(given.shape[1:], config)):
                raise UserError(
                    f"{path}: its mask (the first {len(given)} channels of 'i2v_vae_feature') is not that of "
                    f"conditioning {config.conditioning!r}, which the network has; use features made for it"
                )
        return found
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except KeyError as error:
        raise UserError(f"{path}: holds no {error.args[0]!r}") from None
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError ...
        raise UserError(f"{path}: not a readable file of features: {' '.join(str(error).split())[:120]}") from None


def _only(value: Any) -> Tensor:
    """Return a tensor, or that of a list of one: MindSpeed-MM writes a list where there may be several encoders."""
    return value[0] if isinstance(value, (list, tuple)) else value


def _sample(tensor: Tensor, dims: int) -> Tensor:
    """Return a tensor without the batch dim of 1 that it may have."""
    return tensor[0] if tensor.dim() == dims + 1 else tensor
