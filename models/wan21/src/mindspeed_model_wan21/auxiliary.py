"""The frozen parts of the original release and of diffusers' layout: the VAE, UMT5 and CLIP's vision tower."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.files import write_json
from mindspeed_model_core.frozen import PREPROCESSOR, clip_settings
from mindspeed_model_core.recipe import validate
from mindspeed_model_core.weights.layout import Cat, Layout, Reshape, Row, Same, Table
from mindspeed_model_core.weights.pipelines import VERSION
from mindspeed_model_core.weights.pth import TorchFile
from mindspeed_model_core.weights.tensorfile import Reader, Safetensors
from mindspeed_model_core.weights.translation import PartConfig, Plan, Sizes, file_part, hub_part, parameters, plan
from pydantic import PositiveInt
from torch import nn

# ------------------------------------------------------------------------------------------------ VAE


class VaeConfig(PartConfig):
    """Sizes of the VAE under diffusers' field names (AutoencoderKLWan)."""

    whose: ClassVar[str] = "Wan2.1"
    # The statistics normalise the 16 latent channels; the release has them in its code (wan/modules/vae.py).
    fixed: ClassVar[dict[str, Any]] = {
        "z_dim": 16,
        "attn_scales": [],
        "dropout": 0.0,
        "latents_mean": [
            *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
            *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
        ],
        "latents_std": [
            *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
            *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
        ],
        "decoder_base_dim": None,
        "is_residual": False,
        "in_channels": 3,
        "out_channels": 3,
        "patch_size": None,
    }
    base_dim: PositiveInt
    dim_mult: tuple[PositiveInt, ...]
    num_res_blocks: PositiveInt
    temperal_downsample: tuple[bool, ...]


_VAE_FILE = TorchFile("Wan2.1_VAE.pth")
_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def _build_vae(config: VaeConfig) -> nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**config.settings())


def _vae_modules(config: VaeConfig) -> dict[str, str]:
    """Return diffusers' modules of the VAE and the original ones; decoder blocks are numbered through there."""
    levels, blocks = len(config.dim_mult), config.num_res_blocks
    modules = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    for side in ("encoder", "decoder"):
        modules |= {
            f"{side}.conv_in": f"{side}.conv1",
            f"{side}.mid_block.resnets.0": f"{side}.middle.0",
            f"{side}.mid_block.attentions.0": f"{side}.middle.1",
            f"{side}.mid_block.resnets.1": f"{side}.middle.2",
            f"{side}.norm_out": f"{side}.head.0",
            f"{side}.conv_out": f"{side}.head.2",
        }
    for i in range(levels * (blocks + 1) - 1):
        modules[f"encoder.down_blocks.{i}"] = f"encoder.downsamples.{i}"
    for i in range(levels * (blocks + 2) - 1):
        # The decoder has one block more in each level than the encoder, then, but for the last, the upsampling.
        level, place = divmod(i, blocks + 2)
        inner = f"resnets.{place}" if place <= blocks else "upsamplers.0"
        modules[f"decoder.up_blocks.{level}.{inner}"] = f"decoder.upsamples.{i}"
    return modules


def _vae_rows(config: VaeConfig) -> Iterator[Row]:
    modules = _vae_modules(config)
    for name in parameters(_build_vae, config):
        stem = next(m for m in modules if name.startswith(f"{m}."))
        inner, dot, leaf = name.removeprefix(f"{stem}.").partition(".")
        yield Row(name, f"{modules[stem]}.{_RESIDUAL.get(inner, inner)}{dot}{leaf}")


def read_original_vae(folder: Path) -> VaeConfig:
    """Derive the VAE's sizes from the tensors of ``Wan2.1_VAE.pth``; UserError names a key it lacks."""
    size = Sizes(folder / _VAE_FILE.name, _VAE_FILE.open(folder))
    stem = "encoder.downsamples"
    down = [i for i in range(size.count(stem)) if f"{stem}.{i}.resample.1.weight" in size]
    if not down:
        size.need(f"{stem}.2.resample.1.weight")
    base, blocks = size("encoder.conv1.weight", 0), down[0]
    widths = [size(f"{stem}.{level * (blocks + 1)}.residual.2.weight", 0) for level in range(len(down) + 1)]
    return validate(
        VaeConfig,
        {
            "base_dim": base,
            "dim_mult": tuple(width // base for width in widths),
            "num_res_blocks": blocks,
            "temperal_downsample": tuple(f"{stem}.{i}.time_conv.weight" in size for i in down),
        },
        str(size.path),
    )


VAE_HUB = hub_part(
    VaeConfig,
    _build_vae,
    lambda config: Table(*(Row(name, name) for name in parameters(_build_vae, config))),
    Safetensors("diffusion_pytorch_model", "vae"),
    "vae",
    lambda config: {
        "_class_name": "AutoencoderKLWan",
        "_diffusers_version": VERSION,
        "scale_factor_temporal": 2 ** sum(config.temperal_downsample),
        "scale_factor_spatial": 2 ** len(config.temperal_downsample),
    },
    typed=False,
)
VAE_ORIGINAL = file_part(_build_vae, lambda config: Table(*_vae_rows(config)), _VAE_FILE, read_original_vae)

# ------------------------------------------------------------------------------------------------ text encoder


class TextConfig(PartConfig):
    """Sizes of the UMT5 encoder under transformers' field names."""

    whose: ClassVar[str] = "Wan2.1"
    fixed: ClassVar[dict[str, Any]] = {
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "relative_attention_max_distance": 128,
    }
    vocab_size: PositiveInt
    d_model: PositiveInt
    d_kv: PositiveInt
    d_ff: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    relative_attention_num_buckets: PositiveInt


_TEXT_FILE = TorchFile("models_t5_umt5-xxl-enc-bf16.pth")
_ATTENTION = "encoder.block.*.layer.0.SelfAttention."
_FFN = "encoder.block.*.layer.1.DenseReluDense."
_TEXT = {
    "shared": "token_embedding",
    "encoder.block.*.layer.0.layer_norm": "blocks.*.norm1",
    _ATTENTION + "q": "blocks.*.attn.q",
    _ATTENTION + "k": "blocks.*.attn.k",
    _ATTENTION + "v": "blocks.*.attn.v",
    _ATTENTION + "o": "blocks.*.attn.o",
    _ATTENTION + "relative_attention_bias": "blocks.*.pos_embedding.embedding",
    "encoder.block.*.layer.1.layer_norm": "blocks.*.norm2",
    _FFN + "wi_0": "blocks.*.ffn.gate.0",
    _FFN + "wi_1": "blocks.*.ffn.fc1",
    _FFN + "wo": "blocks.*.ffn.fc2",
    "encoder.final_layer_norm": "norm",
}


def _build_text(config: TextConfig) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**config.settings()))


def read_original_text(folder: Path) -> TextConfig:
    """Derive UMT5's sizes from the tensors of the release's file; the relative bias tells the number of heads."""
    size = Sizes(folder / _TEXT_FILE.name, _TEXT_FILE.open(folder))
    heads = size("blocks.0.pos_embedding.embedding.weight", 1)
    return validate(
        TextConfig,
        {
            "vocab_size": size("token_embedding.weight", 0),
            "d_model": size("token_embedding.weight", 1),
            "d_kv": size("blocks.0.attn.q.weight", 0) // heads,
            "d_ff": size("blocks.0.ffn.fc1.weight", 0),
            "num_layers": size.count("blocks"),
            "num_heads": heads,
            "relative_attention_num_buckets": size("blocks.0.pos_embedding.embedding.weight", 0),
        },
        str(size.path),
    )


TEXT_HUB = hub_part(
    TextConfig,
    _build_text,
    # The encoder's own table is the shared one again, which some folders repeat.
    lambda config: Table(
        *(Row(f"{ours}.weight", f"{ours}.weight") for ours in _TEXT), ignore=("encoder.embed_tokens.weight",)
    ),
    Safetensors("model", "text_encoder"),
    "text_encoder",
    lambda config: {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "num_decoder_layers": config.num_layers,
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "dropout_rate": 0.1,
        "classifier_dropout": 0.0,
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "use_cache": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    },
    typed=True,
)
TEXT_ORIGINAL = file_part(
    _build_text,
    lambda config: Table(*(Row(f"{ours}.weight", f"{theirs}.weight") for ours, theirs in _TEXT.items())),
    _TEXT_FILE,
    read_original_text,
)

# ------------------------------------------------------------------------------------------------ image encoder


class ImageConfig(PartConfig):
    """Sizes of CLIP's vision tower under transformers' field names."""

    whose: ClassVar[str] = "Wan2.1"
    fixed: ClassVar[dict[str, Any]] = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "num_channels": 3,
    }
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    image_size: PositiveInt
    patch_size: PositiveInt
    projection_dim: PositiveInt = 1024


_IMAGE_FILE = TorchFile("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
_HEAD_DIM = 80
_PREFIX = "vision_model."
_LAYER = "encoder.layers.*."
_QKV = _LAYER + "self_attn.qkv_proj"
_IMAGE = {
    "pre_layrnorm": "visual.pre_norm",
    _LAYER + "layer_norm1": "visual.transformer.*.norm1",
    _QKV: "visual.transformer.*.attn.to_qkv",
    _LAYER + "self_attn.out_proj": "visual.transformer.*.attn.proj",
    _LAYER + "layer_norm2": "visual.transformer.*.norm2",
    _LAYER + "mlp.fc1": "visual.transformer.*.mlp.0",
    _LAYER + "mlp.fc2": "visual.transformer.*.mlp.2",
    "post_layernorm": "visual.post_norm",
}
_EMBEDDINGS = {
    "embeddings.class_embedding": "visual.cls_embedding",
    "embeddings.patch_embedding.weight": "visual.patch_embedding.weight",
    "embeddings.position_embedding.weight": "visual.pos_embedding",
}


def _build_image(config: ImageConfig) -> nn.Module:
    """Build the vision tower with query, key and value in one layer, as the release has them."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    net: Any = CLIPVisionModel(CLIPVisionConfig(**config.settings()))
    net = getattr(net, "vision_model", net)  # the first releases of transformers 5 have the tower one level down
    for layer in net.encoder.layers:
        del layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
        layer.self_attn.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
    return net


@dataclass(frozen=True)
class _ImageFiles(Safetensors):
    """The published folders' names carry a prefix, those that transformers 5 saves may lack it; both are read."""

    def open(self, folder: Path) -> Reader:
        """Read the headers of all files, every name with the prefix."""
        slots = super().open(folder).slots
        return Reader({_PREFIX + name.removeprefix(_PREFIX): held for name, held in slots.items()})


def _image_hub_table(config: ImageConfig) -> Table:
    rows = [Row(ours, _PREFIX + ours) for ours in _EMBEDDINGS]
    for stem in _IMAGE:
        for leaf in ("weight", "bias"):
            if stem == _QKV:
                parts = tuple(f"{_PREFIX}{_LAYER}self_attn.{part}_proj.{leaf}" for part in "qkv")
                rows.append(Row(f"{stem}.{leaf}", parts, Cat()))
            else:
                rows.append(Row(f"{stem}.{leaf}", f"{_PREFIX}{stem}.{leaf}"))
    # A buffer that transformers before 4.31 saved.
    return Table(*rows, ignore=(_PREFIX + "embeddings.position_ids",))


def _image_original_table(config: ImageConfig) -> Table:
    width, tokens = config.hidden_size, 1 + (config.image_size // config.patch_size) ** 2
    shapes = {
        "embeddings.class_embedding": Reshape((1, 1, width), (width,)),
        "embeddings.position_embedding.weight": Reshape((1, tokens, width), (tokens, width)),
    }
    rows = [Row(ours, theirs, shapes.get(ours, Same())) for ours, theirs in _EMBEDDINGS.items()]
    rows += [Row(f"{o}.{leaf}", f"{t}.{leaf}") for o, t in _IMAGE.items() for leaf in ("weight", "bias")]
    # The text tower and the projections into the space that both share: Wan2.1 reads states of the vision tower.
    return Table(*rows, ignore=("visual.head", "textual.**", "log_scale"))


def read_original_image(folder: Path) -> ImageConfig:
    """Derive the vision tower's sizes from the release's file, but for the width of a head, which all have at 80."""
    size = Sizes(folder / _IMAGE_FILE.name, _IMAGE_FILE.open(folder))
    width, patch = size("visual.cls_embedding", 2), size("visual.patch_embedding.weight", 2)
    if width % _HEAD_DIM:
        rule = f"heads of {_HEAD_DIM} as CLIP ViT-H/14's are"
        raise UserError(f"{size.path}: visual.cls_embedding: its width of {width} does not divide into {rule}")
    return validate(
        ImageConfig,
        {
            "hidden_size": width,
            "intermediate_size": size("visual.transformer.0.mlp.0.weight", 0),
            "num_hidden_layers": size.count("visual.transformer"),
            "num_attention_heads": width // _HEAD_DIM,
            "image_size": patch * math.isqrt(size("visual.pos_embedding", 1) - 1),
            "patch_size": patch,
            **({"projection_dim": size("visual.head", 1)} if "visual.head" in size else {}),
        },
        str(size.path),
    )


_IMAGE_PART = hub_part(
    ImageConfig,
    _build_image,
    _image_hub_table,
    _ImageFiles("model", "image_encoder"),
    "image_encoder",
    lambda config: {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
    },
    typed=True,
)


def _write_image(config: ImageConfig, folder: Path, dtype: torch.dtype) -> None:
    _IMAGE_PART.write_config(config, folder, dtype)
    (folder / "image_processor").mkdir()
    write_json(folder / "image_processor" / PREPROCESSOR, clip_settings(config.image_size))


IMAGE_HUB = replace(_IMAGE_PART, write_config=_write_image)
IMAGE_ORIGINAL = file_part(_build_image, _image_original_table, _IMAGE_FILE, read_original_image)

# ------------------------------------------------------------------------------------------------ both ways

_PAIRS: tuple[tuple[Layout, Layout], ...] = (
    (VAE_ORIGINAL, VAE_HUB),
    (TEXT_ORIGINAL, TEXT_HUB),
    (IMAGE_ORIGINAL, IMAGE_HUB),
)
_TOKENIZER_HUB = "tokenizer"
_TOKENIZER_ORIGINAL = "google/umt5-xxl"


def translate(source: Path, *, image: bool) -> Plan | None:
    """Plan to write the frozen parts of an original release in diffusers' layout; None if there are none.

    They are ``vae/``, ``text_encoder/``, ``tokenizer/`` and, with ``image``, ``image_encoder/`` and
    ``image_processor/``. UserError names a file or key that is missing or wrong.
    """
    pairs = _PAIRS[: 2 + image]
    if not any(here.detect(source) for here, _ in pairs):
        return None
    return plan(source, pairs, {_TOKENIZER_ORIGINAL: _TOKENIZER_HUB})


def restore(source: Path, *, image: bool) -> Plan | None:
    """Plan to write the frozen parts of a folder in diffusers' layout as the original release has them.

    It undoes ``translate``, except that CLIP's file holds only the vision tower without its head: no more of it is in
    diffusers' layout, and Wan2.1 computes with no more. UserError also names a setting the release cannot say.
    """
    pairs = [(there, here) for here, there in _PAIRS[: 2 + image]]
    if not any(here.detect(source) for here, _ in pairs):
        return None
    return plan(source, pairs, {_TOKENIZER_HUB: _TOKENIZER_ORIGINAL})
