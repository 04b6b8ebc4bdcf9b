"""Encoders small enough for a CPU, in the layout of the published ones: for tests and the demonstration."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindspeed_model_core.frozen import quiet, signed
from mindspeed_model_core.showcase import letters, settle, train_vae
from torch import Tensor

from .encoders import Encoders

TEXT_WIDTH, POOLED_WIDTH, LATENTS = 32, 24, 16
CLIP_TOKENS = 77


def write_tiny_encoders(folder: str | Path) -> Path:
    """Write ``vae/``, ``text_encoder/``, ``text_encoder_2/`` and their tokenizers: always the same ones.

    The VAE has the published strides and 16 latent channels; text has one token a letter, its embeddings are 32 wide,
    the pooled ones 24.
    """
    folder = Path(folder)
    with quiet():  # a bar for each part
        _write(folder)
    return folder


def train_tiny_vae(folder: str | Path, images: Sequence[Tensor], steps: int = 200) -> float:
    """Train the VAE of a folder to reconstruct ``images``, each uint8 ``[3, H, W]``; return its PSNR on them in dB.

    Afterwards the published shift and scale are replaced by those of these images' latents.
    """
    encoders = Encoders(folder)
    quality, values = train_vae(encoders.vae, [signed(image[None], encoders.device) for image in images], steps)
    encoders.vae.register_to_config(shift_factor=float(values.mean()), scaling_factor=1 / float(values.std()))
    encoders.vae.save_pretrained(Path(folder) / "vae")
    return quality


def _write(folder: Path) -> None:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    settle(vae, 1).save_pretrained(folder / "vae")
    words = letters()
    words.save_pretrained(folder / "tokenizer_2")
    t5 = T5Config(
        vocab_size=len(words),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    settle(T5EncoderModel(t5), 2).save_pretrained(folder / "text_encoder_2")
    tokenizer = _clip_letters()
    tokenizer.save_pretrained(folder / "tokenizer")
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=POOLED_WIDTH,
        intermediate_size=2 * POOLED_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    settle(CLIPTextModel(clip), 3).save_pretrained(folder / "text_encoder")


def _clip_letters() -> Any:
    """Return a CLIP tokenizer whose words are the printable characters."""
    from transformers import CLIPTokenizer

    # CLIP has no capitals, and tells a word's last letter from the others.
    characters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*characters, *(f"{each}</w>" for each in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_TOKENS)
