"""Llama-2's configuration under the hub's field names, and its published sizes."""

from __future__ import annotations

from mindspeed_model_core.recipe import Section
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator


class Llama2Config(Section):
    """Sizes of a Llama-2 network (Touvron et al. 2023, arXiv:2307.09288); defaults are those shared by all sizes."""

    vocab_size: PositiveInt = 32000
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    max_position_embeddings: PositiveInt = 4096
    initializer_range: NonNegativeFloat = 0.02
    bos_token_id: int = 1
    eos_token_id: int = 2

    @model_validator(mode="after")
    def _check(self) -> Llama2Config:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} does not divide by num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} (hidden_size / num_attention_heads) must be even for rotary")
        return self

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head."""
        return self.hidden_size // self.num_attention_heads


def _size(hidden: int, ffn: int, layers: int, heads: int, kv: int, **rest: int) -> Llama2Config:
    return Llama2Config(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        **rest,
    )


PRESETS = {
    "7b": _size(4096, 11008, 32, 32, 32),
    "13b": _size(5120, 13824, 40, 40, 40),
    "70b": _size(8192, 28672, 80, 64, 8),
    "tiny": _size(64, 176, 4, 4, 2, vocab_size=512, max_position_embeddings=256),
}
