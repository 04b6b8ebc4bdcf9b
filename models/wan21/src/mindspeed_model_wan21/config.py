"""Wan2.1's configuration under diffusers' field names, and its published sizes."""

from __future__ import annotations

from typing import Literal

from mindspeed_model_core.recipe import Section
from pydantic import PositiveFloat, PositiveInt, model_validator


class Wan21Config(Section):
    """Sizes of a Wan2.1 diffusion transformer (Wan team 2025, arXiv:2503.20314); defaults are those of all sizes.

    ``image_dim`` set makes it image-to-video: it reads the tokens of a first frame (with ``pos_embed_seq_len`` of a
    first and a last one), and its input holds noise, mask and condition latents.
    """

    num_layers: PositiveInt
    num_attention_heads: PositiveInt
    attention_head_dim: PositiveInt = 128
    ffn_dim: PositiveInt
    in_channels: PositiveInt = 16
    out_channels: PositiveInt = 16
    patch_size: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 2, 2)
    freq_dim: PositiveInt = 256
    text_dim: PositiveInt = 4096
    image_dim: PositiveInt | None = None
    pos_embed_seq_len: PositiveInt | None = None
    rope_max_seq_len: PositiveInt = 1024
    eps: PositiveFloat = 1e-6

    @model_validator(mode="after")
    def _check(self) -> Wan21Config:
        if self.attention_head_dim % 2:
            raise ValueError(f"attention_head_dim={self.attention_head_dim} must be even for rotary embedding")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim={self.freq_dim} must be even: half are cosines, half sines")
        if self.pos_embed_seq_len is not None:
            if self.image_dim is None:
                raise ValueError(f"pos_embed_seq_len={self.pos_embed_seq_len} needs image_dim")
            if self.pos_embed_seq_len % 2:
                raise ValueError(f"pos_embed_seq_len={self.pos_embed_seq_len} must be even: the tokens of two frames")
        if self.in_channels < self.out_channels:
            raise ValueError(f"in_channels={self.in_channels} are fewer than out_channels={self.out_channels}")
        if self.image_dim is not None and self.mask_channels < 1:
            raise ValueError(
                f"in_channels={self.in_channels} must be above {2 * self.out_channels} with image_dim: noise and "
                f"condition of out_channels={self.out_channels} each, and a mask"
            )
        if self.image_dim is None and self.in_channels != self.out_channels:
            raise ValueError(
                f"in_channels={self.in_channels} differ from out_channels={self.out_channels}, which needs image_dim"
            )
        return self

    @property
    def width(self) -> int:
        """Return the width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Return how many elements of a head turn with the frame, the row and the column."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side

    @property
    def conditioning(self) -> Literal["none", "first", "first-last"]:
        """Return which frames of the video are given."""
        if self.image_dim is None:
            return "none"
        return "first" if self.pos_embed_seq_len is None else "first-last"

    @property
    def shift(self) -> float:
        """Return the shift of the noise levels that the release samples with; it has 5 for image-to-video in 720p."""
        return {"none": 5.0, "first": 3.0, "first-last": 16.0}[self.conditioning]

    @property
    def mask_channels(self) -> int:
        """Return the channels of the mask that says which latent frames are given; 0 for text-to-video."""
        return self.in_channels - 2 * self.out_channels if self.image_dim else 0


def _size(layers: int, heads: int, ffn: int, **rest: int) -> Wan21Config:
    return Wan21Config(num_layers=layers, num_attention_heads=heads, ffn_dim=ffn, **rest)  # type: ignore[arg-type]


_SMALL, _LARGE = (30, 12, 8960), (40, 40, 13824)
_TINY = {"attention_head_dim": 16, "text_dim": 32, "freq_dim": 32, "rope_max_seq_len": 64}
_IMAGE = {"in_channels": 36, "image_dim": 1280}

PRESETS = {
    "t2v-1.3b": _size(*_SMALL),
    "t2v-14b": _size(*_LARGE),
    "i2v-1.3b": _size(*_SMALL, **_IMAGE),
    "i2v-14b": _size(*_LARGE, **_IMAGE),
    "flf2v-14b": _size(*_LARGE, **_IMAGE, pos_embed_seq_len=514),
    "tiny-t2v": _size(4, 4, 96, **_TINY),
    "tiny-i2v": _size(4, 4, 96, **_TINY, in_channels=36, image_dim=20),
}
