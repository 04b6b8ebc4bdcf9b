"""Encoders small enough for a CPU, in the layout of the published ones: for tests and the demonstration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mindspeed_model_core.files import write_json
from mindspeed_model_core.frozen import PREPROCESSOR, clip_settings, quiet, signed
from mindspeed_model_core.showcase import letters, settle, train_vae
from torch import Tensor

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
    vae = encoders.vae
    quality, values = train_vae(vae, [signed(clip[None], encoders.device).transpose(1, 2) for clip in clips], steps)
    vae.register_to_config(latents_mean=values.mean(1).tolist(), latents_std=values.std(1).clamp_min(1e-3).tolist())
    vae.save_pretrained(Path(folder) / "vae")
    return quality
