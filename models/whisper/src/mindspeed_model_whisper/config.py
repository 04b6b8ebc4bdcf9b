"""Whisper's configuration under the hub's field names, and its published sizes."""

from __future__ import annotations

from mindspeed_model_core.recipe import Section
from pydantic import NonNegativeFloat, PositiveInt, model_validator


class WhisperConfig(Section):
    """Sizes of a Whisper network (Radford et al. 2022, arXiv:2212.04356); defaults are those most sizes share.

    ``max_source_positions`` is half the frames of a log-mel spectrogram, ``max_target_positions`` the longest text.
    """

    vocab_size: PositiveInt = 51865
    num_mel_bins: PositiveInt = 80
    d_model: PositiveInt
    encoder_layers: PositiveInt
    decoder_layers: PositiveInt
    encoder_attention_heads: PositiveInt
    decoder_attention_heads: PositiveInt
    encoder_ffn_dim: PositiveInt
    decoder_ffn_dim: PositiveInt
    max_source_positions: PositiveInt = 1500
    max_target_positions: PositiveInt = 448
    init_std: NonNegativeFloat = 0.02
    pad_token_id: int = 50257
    bos_token_id: int = 50257
    eos_token_id: int = 50257
    decoder_start_token_id: int = 50258

    @model_validator(mode="after")
    def _check(self) -> WhisperConfig:
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(f"d_model={self.d_model} does not divide by {name}={getattr(self, name)}")
        if self.d_model % 2 or self.d_model < 4:
            raise ValueError(f"d_model={self.d_model} must be even and at least 4: half are sines, half cosines")
        for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} is not below vocab_size={self.vocab_size}")
        return self

    @property
    def frames(self) -> int:
        """Return the frames of a log-mel spectrogram, 10 ms each."""
        return 2 * self.max_source_positions

    @property
    def multilingual(self) -> bool:
        """Return whether it knows other languages than English; the release, too, tells it by the vocabulary's size."""
        return self.vocab_size != _ENGLISH["vocab_size"]


def _size(width: int, layers: int, heads: int, decoder_layers: int | None = None, **rest: int) -> WhisperConfig:
    return WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=decoder_layers or layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        **rest,  # type: ignore[arg-type]
    )


_SIZES = {"tiny": (384, 4, 6), "base": (512, 6, 8), "small": (768, 12, 12), "medium": (1024, 24, 16)}
_LARGE = (1280, 32, 20)
_ENGLISH = {
    "vocab_size": 51864,
    "pad_token_id": 50256,
    "bos_token_id": 50257,
    "eos_token_id": 50256,
    "decoder_start_token_id": 50257,
}
_V3 = {"num_mel_bins": 128, "vocab_size": 51866}
_MINI = {
    "num_mel_bins": 8,
    "vocab_size": 320,
    "max_source_positions": 50,
    "max_target_positions": 32,
    "pad_token_id": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "decoder_start_token_id": 257,
}

PRESETS = {
    **{name: _size(*size) for name, size in _SIZES.items()},
    **{f"{name}.en": _size(*size, **_ENGLISH) for name, size in _SIZES.items()},
    # large-v1 has the same.
    "large-v2": _size(*_LARGE),
    "large-v3": _size(*_LARGE, **_V3, pad_token_id=50256),
    "large-v3-turbo": _size(*_LARGE, decoder_layers=4, **_V3),
    "mini": _size(32, 2, 4, **_MINI),
}
