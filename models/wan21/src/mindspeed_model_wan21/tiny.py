"""Encoders small enough for a CPU, in the layout of the published ones: for tests and the demonstration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from mindspeed_model_core.frozen import PREPROCESSOR, clip_settings, quiet
from mindspeed_model_core.showcase import letters, settle
from mindspeed_model_core.tensorfile import write_json
from torch import Tensor, nn

from .encoders import Encoders

TEXT_WIDTH = 32
IMAGE_WIDTH, IMAGE_TOKENS = 20, 5
LATENTS = 16

_IMAGE_SIZE, _PATCH = 28, 14


def write_tiny_encoders(folder: str | Path, *, image: bool = True) -> Path:
    """Write ``vae/``, ``text_encoder/``, ``tokenizer/`` and, with ``image``, ``image_encoder/``: always the same ones.

    The VAE has the published strides and 16 latent channels; text embeddings are 32 wide, one token a letter; images
    become 5 tokens, 20 wide.
    """
    folder = Path(folder)
    with quiet():  # a bar for each part
        _write(folder, image)
    return folder


def _write(folder: Path, image: bool) -> None:
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    vae = AutoencoderKLWan(base_dim=8, z_dim=LATENTS, num_res_blocks=1)
    settle(vae, 1).save_pretrained(folder / "vae")

    tokenizer = letters()
    tokenizer.save_pretrained(folder / "tokenizer")
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    settle(text, 2).save_pretrained(folder / "text_encoder")
    if image:
        clip = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=IMAGE_WIDTH,
                intermediate_size=2 * IMAGE_WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=_IMAGE_SIZE,
                patch_size=_PATCH,
                hidden_act="gelu",
            )
        )
        settle(clip, 3).save_pretrained(folder / "image_encoder")
        (folder / "image_processor").mkdir(parents=True, exist_ok=True)
        write_json(folder / "image_processor" / PREPROCESSOR, clip_settings(_IMAGE_SIZE))


def train_tiny_vae(folder: str | Path, clips: Sequence[Tensor], steps: int = 200) -> float:
    """Train the VAE of a folder to reconstruct ``clips``, each uint8 ``[F, 3, H, W]``; return its PSNR on them in dB.

    Afterwards the published statistics are replaced by those of these clips' latents, so that they are normalised.
    """
    encoders = Encoders(folder)
    vae = encoders.vae.requires_grad_(True).train()
    videos = [clip[None].transpose(1, 2).float() / 127.5 - 1 for clip in clips]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        video = videos[step % len(videos)]
        z = vae.encode(video).latent_dist.mode()
        # Noise keeps the latents from hiding detail in digits that a sampler cannot hit.
        noise = torch.randn(z.shape, generator=generator) * 0.05
        # Not clamped as decode() does: a saturated pixel would get no gradient.
        error = (vae.decode(z + noise).sample - video).square().mean() + 1e-4 * z.square().mean()
        optimizer.zero_grad()
        error.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vae.requires_grad_(False).eval()
    with torch.no_grad():
        latents = [vae.encode(video).latent_dist.mode()[0].flatten(1) for video in videos]
        errors = [(vae.decode(vae.encode(v).latent_dist.mode()).sample - v).square().mean() for v in videos]
    values = torch.cat(latents, 1)
    vae.register_to_config(latents_mean=values.mean(1).tolist(), latents_std=values.std(1).clamp_min(1e-3).tolist())
    vae.save_pretrained(Path(folder) / "vae")
    return -10 * math.log10(float(torch.stack(errors).mean()) / 4)
