"""FLUX.1's frozen encoders, as diffusers lays them out: images to latents, text to embeddings by T5 and CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import frozen
from mindspeed_model_core.frozen import FrozenParts, signed, unsigned
from mindspeed_model_core.trunk import Batch
from torch import Tensor

NEEDED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class Encoders(FrozenParts):
    """The VAE, CLIP and T5 of a folder in diffusers' layout, each loaded when it is first used.

    ``folder`` holds ``vae/``, CLIP in ``text_encoder/`` and ``tokenizer/``, T5 in ``text_encoder_2/`` and
    ``tokenizer_2/``. CLIP and T5 compute in ``text_dtype``, the VAE in ``dtype``.
    """

    needed = NEEDED

    @cached_property
    def vae(self) -> Any:
        """Return diffusers' AutoencoderKL."""
        from diffusers import AutoencoderKL

        return self.load("vae", AutoencoderKL, torch_dtype=self.dtype)

    @cached_property
    def text_encoder(self) -> Any:
        """Return transformers' CLIPTextModel."""
        from transformers import CLIPTextModel

        return self.load("text_encoder", CLIPTextModel, dtype=self.text_dtype)

    @cached_property
    def text_encoder_2(self) -> Any:
        """Return transformers' T5EncoderModel."""
        from transformers import T5EncoderModel

        return self.load("text_encoder_2", T5EncoderModel, dtype=self.text_dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """Return CLIP's tokenizer."""
        from transformers import CLIPTokenizer

        return self.load_tokenizer("tokenizer", CLIPTokenizer)

    @cached_property
    def tokenizer_2(self) -> Any:
        """Return T5's tokenizer."""
        from transformers import T5TokenizerFast

        return self.load_tokenizer("tokenizer_2", T5TokenizerFast)

    @torch.no_grad()
    def images(self, frames: Tensor) -> Tensor:
        """Return fp32 normalised latents ``[B, channels, H / 8, W / 8]`` of uint8 images ``[B, 3, H, W]``.

        They are the posterior's mode, shifted and scaled as the VAE's configuration says.
        """
        z = self.vae.encode(signed(frames, self.device).to(self.vae.dtype)).latent_dist.mode().float()
        return (z - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 images ``[B, 3, H, W]`` of normalised latents ``[B, channels, H / 8, W / 8]``."""
        z = devices.send(latents, self.device).float() / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return unsigned(self.vae.decode(z.to(self.vae.dtype)).sample)

    @torch.no_grad()
    def text(self, prompts: Sequence[str], tokens: int) -> dict[str, Tensor]:
        """Return T5's states ``text`` ``[B, tokens, width]`` and CLIP's ``pooled`` ``[B, width]``.

        T5 sees each prompt cut or filled up to ``tokens``, and the network what it makes of the filling, too: no mask
        is given to either.
        """
        rows = self._ids(self.tokenizer_2, prompts, tokens)
        pooled = self._ids(self.tokenizer, prompts, self.text_encoder.config.max_position_embeddings)
        return {
            "text": self.text_encoder_2(rows).last_hidden_state,
            "pooled": self.text_encoder(pooled).pooler_output,
        }

    def _ids(self, tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
        found = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return devices.send(found, self.device)

    def batch(self, raw: Batch, tokens: int) -> Batch:
        """Return a batch of features, as prepared ones are, of a batch of images, ``captions`` and ``seeds``."""
        images = {"latents": self.images(raw["video"][:, 0])}
        if "reference" in raw:
            images["reference"] = self.images(raw["reference"][:, 0])
        return {**images, **self.text(raw["captions"], tokens), "seeds": raw["seeds"]}


def fingerprint(folder: str | Path) -> str:
    """Return 12 hex digits that change with the encoders' files."""
    return frozen.fingerprint(folder, NEEDED)
