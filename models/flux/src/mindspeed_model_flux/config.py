"""FLUX.1's configuration under diffusers' field names, and its published sizes."""

from __future__ import annotations

from mindspeed_model_core.recipe import Section
from pydantic import PositiveInt, model_validator

PATCH = 2
"""Latents along a side that come to one token."""


class FluxConfig(Section):
    """Sizes of a FLUX.1 diffusion transformer (Black Forest Labs 2024); defaults are those of dev.

    ``guidance_embeds`` makes the strength of guidance an input, as in dev; schnell has none. ``kontext`` says that it
    takes a reference image, too, which changes no weight's shape; diffusers has it in the pipeline's name.
    """

    num_layers: PositiveInt = 19
    num_single_layers: PositiveInt = 38
    num_attention_heads: PositiveInt = 24
    attention_head_dim: PositiveInt = 128
    in_channels: PositiveInt = 64
    joint_attention_dim: PositiveInt = 4096
    pooled_projection_dim: PositiveInt = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[PositiveInt, PositiveInt, PositiveInt] = (16, 56, 56)
    kontext: bool = False

    @model_validator(mode="after")
    def _check(self) -> FluxConfig:
        odd = [dim for dim in self.axes_dims_rope if dim % 2]
        if odd:
            raise ValueError(f"axes_dims_rope={list(self.axes_dims_rope)}: {odd[0]} must be even for rotary embedding")
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope={list(self.axes_dims_rope)} add up to {sum(self.axes_dims_rope)}, which must be "
                f"attention_head_dim={self.attention_head_dim}"
            )
        if self.in_channels % PATCH**2:
            raise ValueError(f"in_channels={self.in_channels} must be a multiple of 4: a token holds 2 x 2 latents")
        return self

    @property
    def width(self) -> int:
        """Return the width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def hidden(self) -> int:
        """Return the width of the feed-forward layers."""
        return 4 * self.width

    @property
    def channels(self) -> int:
        """Return the channels of the latents."""
        return self.in_channels // PATCH**2


PRESETS = {
    "dev": FluxConfig(),
    "schnell": FluxConfig(guidance_embeds=False),
    "kontext": FluxConfig(kontext=True),
    "tiny": FluxConfig(
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
    ),
}
