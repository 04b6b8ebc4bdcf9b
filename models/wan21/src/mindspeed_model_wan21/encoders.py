"""Wan2.1's frozen encoders, as diffusers lays them out: videos to latents, text and images to embeddings."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core import frozen
from mindspeed_model_core.data import load_tokenizer
from mindspeed_model_core.frozen import ClipProcessor, FrozenParts, signed, unsigned
from mindspeed_model_core.trunk import Batch
from torch import Tensor

TEXT_LENGTH = 512
"""Tokens of text that the network attends to; rows beyond the text are zero."""

NEEDED = ("vae", "text_encoder", "tokenizer")
IMAGE = "image_encoder"


class Encoders(FrozenParts):
    """The VAE, UMT5 and CLIP of a folder in diffusers' layout, each loaded when it is first used.

    ``folder`` holds ``vae/``, ``text_encoder/``, ``tokenizer/`` and, for images, ``image_encoder/``. UMT5 computes in
    ``text_dtype``, the VAE and CLIP in ``dtype``.
    """

    needed = NEEDED

    @cached_property
    def vae(self) -> Any:
        """Return diffusers' AutoencoderKLWan."""
        from diffusers import AutoencoderKLWan

        return self.load("vae", AutoencoderKLWan, torch_dtype=self.dtype)

    @cached_property
    def text_encoder(self) -> Any:
        """Return transformers' UMT5EncoderModel."""
        from transformers import UMT5EncoderModel

        return self.load("text_encoder", UMT5EncoderModel, dtype=self.text_dtype)

    @cached_property
    def image_encoder(self) -> Any:
        """Return transformers' CLIPVisionModel."""
        from transformers import CLIPVisionModel

        return self.load(IMAGE, CLIPVisionModel, dtype=self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """Return UMT5's tokenizer."""
        return load_tokenizer(self.part("tokenizer"))

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean, std = (torch.tensor(v, device=self.device) for v in (config.latents_mean, config.latents_std))
        return mean.view(1, -1, 1, 1, 1), 1.0 / std.view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def video(self, frames: Tensor) -> Tensor:
        """Return fp32 normalised latents ``[B, z, T, h, w]`` of uint8 frames ``[B, F, 3, H, W]``, F = 4T - 3.

        They are the posterior's mode, ``(z - mean) / std`` by the VAE's published statistics of each channel.
        """
        return self._latents(signed(frames, self.device).transpose(1, 2))

    @torch.no_grad()
    def condition(self, first: Tensor, last: Tensor | None, frames: int) -> Tensor:
        """Return fp32 normalised latents ``[B, z, T, h, w]`` of a video that is grey but for its ends.

        ``first`` and ``last`` are uint8 ``[B, 3, H, W]``; grey is 0 in the VAE's range.
        """
        ends = [signed(each, self.device)[:, :, None] for each in (first, last) if each is not None]
        batch, channels, _, height, width = ends[0].shape
        ends.insert(1, ends[0].new_zeros(batch, channels, frames - len(ends), height, width))
        return self._latents(torch.cat(ends, 2))

    def given(self, video: Tensor, conditioning: str) -> dict[str, Tensor]:
        """Return what image-to-video is given of uint8 clips ``[B, F, 3, H, W]``; nothing for ``"none"``.

        ``image`` ``[B, tokens, width]`` are CLIP's states of the first frame, with ``"first-last"`` followed by those
        of the last one; ``condition`` ``[B, z, T, h, w]`` are the latents of these frames and grey ones between.
        """
        if conditioning == "none":
            return {}
        first, last = video[:, 0], video[:, -1] if conditioning == "first-last" else None
        image = torch.cat([self.image(each) for each in (first, last) if each is not None], 1)
        return {"image": image, "condition": self.condition(first, last, video.shape[1])}

    def batch(self, raw: Batch, conditioning: str) -> Batch:
        """Return a batch of features, as prepared ones are, of a batch with ``video``, ``captions`` and ``seeds``."""
        video = raw["video"]
        text = self.text(raw["captions"])
        return {"latents": self.video(video), "text": text, "seeds": raw["seeds"], **self.given(video, conditioning)}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return uint8 frames ``[B, F, 3, H, W]`` of normalised latents ``[B, z, T, h, w]``."""
        mean, scale = self._statistics
        z = latents.to(self.device, torch.float32) / scale + mean
        return unsigned(self.vae.decode(z.to(self.vae.dtype)).sample).transpose(1, 2)

    @torch.no_grad()
    def text_rows(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return the embeddings of each prompt's tokens, ``[tokens, width]``, at most 512 tokens."""
        tokens = self.tokenizer(
            [clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=TEXT_LENGTH,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = (devices.send(each, self.device) for each in (tokens.input_ids, tokens.attention_mask))
        states = self.text_encoder(ids, mask).last_hidden_state
        lengths = tokens.attention_mask.sum(1).tolist()
        return [rows[:length] for rows, length in zip(states, lengths, strict=True)]

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings ``[B, 512, width]``, zero beyond each prompt's tokens."""
        return pad_text(self.text_rows(prompts))

    @torch.no_grad()
    def image(self, frames: Tensor) -> Tensor:
        """Return CLIP's states before its last block, ``[B, tokens, width]``, of uint8 images ``[B, 3, H, W]``."""
        pixels = torch.stack([self.image_processor.pixels(frame) for frame in frames])
        pixels = devices.send(pixels, self.device).to(self.image_encoder.dtype)
        return self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]

    @cached_property
    def image_processor(self) -> ClipProcessor:
        """Return what makes CLIP's input of images."""
        return ClipProcessor(self.folder / "image_processor", self.folder / IMAGE)

    def _latents(self, video: Tensor) -> Tensor:
        mean, scale = self._statistics
        return (self.vae.encode(video.to(self.vae.dtype)).latent_dist.mode().float() - mean) * scale


def fingerprint(folder: str | Path) -> str:
    """Return 12 hex digits that change with the encoders' files."""
    return frozen.fingerprint(folder, (*NEEDED, IMAGE))


def pad_text(rows: Sequence[Tensor]) -> Tensor:
    """Return ``[B, 512, width]`` of embeddings ``[tokens, width]``, zero beyond each one's tokens."""
    return frozen.pad_rows(rows, TEXT_LENGTH)


def clean(prompt: str) -> str:
    """Return a prompt as Wan2.1 reads it: text mended by ftfy, HTML entities resolved, spaces merged."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", text).strip()
