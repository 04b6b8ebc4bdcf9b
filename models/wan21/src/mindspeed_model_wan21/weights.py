"""Wan2.1's weight tables: diffusers' layout and the original release, which differ in names alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.files import read_json, write_json
from mindspeed_model_core.recipe import validate
from mindspeed_model_core.weights.layout import Cat, Layout, Op, Reshape, Row, Same, Table
from mindspeed_model_core.weights.pipelines import PipelineNetwork, complete_pipeline
from mindspeed_model_core.weights.tensorfile import Safetensors
from mindspeed_model_core.weights.translation import Sizes

from .config import Wan21Config
from .model import TEXT_TOKENS, Wan21

# Our modules with weight and bias, and their name in diffusers' and in the original layout.
_LAYERS = {
    "patches.proj": ("patch_embedding", "patch_embedding"),
    "time.up": ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    "time.out": ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    "time.modulations": ("condition_embedder.time_proj", "time_projection.1"),
    "text.up": ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    "text.out": ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    "blocks.*.cross_norm": ("blocks.*.norm2", "blocks.*.norm3"),
    "blocks.*.self_attention.out": ("blocks.*.attn1.to_out.0", "blocks.*.self_attn.o"),
    "blocks.*.cross_attention.q": ("blocks.*.attn2.to_q", "blocks.*.cross_attn.q"),
    "blocks.*.cross_attention.out": ("blocks.*.attn2.to_out.0", "blocks.*.cross_attn.o"),
    "blocks.*.mlp.up": ("blocks.*.ffn.net.0.proj", "blocks.*.ffn.0"),
    "blocks.*.mlp.down": ("blocks.*.ffn.net.2", "blocks.*.ffn.2"),
    "head.proj": ("proj_out", "head.head"),
}
# Those that stack several of theirs, which are named after the stem by a letter.
_STACKS = {
    "blocks.*.self_attention.qkv": (("blocks.*.attn1.to_", "qkv"), ("blocks.*.self_attn.", "qkv")),
    "blocks.*.cross_attention.kv": (("blocks.*.attn2.to_", "kv"), ("blocks.*.cross_attn.", "kv")),
}
# Parameters of another name than weight and bias, or alone.
_PLAIN = {
    "blocks.*.self_attention.q_norm.weight": ("blocks.*.attn1.norm_q.weight", "blocks.*.self_attn.norm_q.weight"),
    "blocks.*.self_attention.k_norm.weight": ("blocks.*.attn1.norm_k.weight", "blocks.*.self_attn.norm_k.weight"),
    "blocks.*.cross_attention.q_norm.weight": ("blocks.*.attn2.norm_q.weight", "blocks.*.cross_attn.norm_q.weight"),
    "blocks.*.cross_attention.k_norm.weight": ("blocks.*.attn2.norm_k.weight", "blocks.*.cross_attn.norm_k.weight"),
    "blocks.*.modulation.table": ("blocks.*.scale_shift_table", "blocks.*.modulation"),
    "head.modulation.table": ("scale_shift_table", "head.modulation"),
}
_IMAGE = "condition_embedder.image_embedder."
_IMAGE_LAYERS = {
    "image.norm": (_IMAGE + "norm1", "img_emb.proj.0"),
    "image.up": (_IMAGE + "ff.net.0.proj", "img_emb.proj.1"),
    "image.out": (_IMAGE + "ff.net.2", "img_emb.proj.3"),
    "image.out_norm": (_IMAGE + "norm2", "img_emb.proj.4"),
}
_IMAGE_PLAIN = {
    "blocks.*.cross_attention.image_k_norm.weight": (
        "blocks.*.attn2.norm_added_k.weight",
        "blocks.*.cross_attn.norm_k_img.weight",
    ),
}
_IMAGE_KV = (
    ("blocks.*.attn2.add_k_proj", "blocks.*.attn2.add_v_proj"),
    ("blocks.*.cross_attn.k_img", "blocks.*.cross_attn.v_img"),
)
_POSITIONS = (_IMAGE + "pos_embed", "img_emb.emb_pos")
_HUB, _ORIGINAL = 0, 1


def _rows(config: Wan21Config, which: int) -> Iterator[Row]:
    reshapes = _reshapes(config)
    pairs: list[tuple[str, str | tuple[str, ...]]] = []
    for ours, theirs in {**_LAYERS, **(_IMAGE_LAYERS if config.image_dim else {})}.items():
        pairs += [(f"{ours}.{leaf}", f"{theirs[which]}.{leaf}") for leaf in ("weight", "bias")]
    for ours, stems in _STACKS.items():
        stem, letters = stems[which]
        pairs += [
            (f"{ours}.{leaf}", tuple(f"{stem}{letter}.{leaf}" for letter in letters)) for leaf in ("weight", "bias")
        ]
    pairs += [(ours, theirs[which]) for ours, theirs in _PLAIN.items()]
    if config.image_dim:
        pairs += [(ours, theirs[which]) for ours, theirs in _IMAGE_PLAIN.items()]
        pairs += [
            (f"blocks.*.cross_attention.image_kv.{leaf}", tuple(f"{name}.{leaf}" for name in _IMAGE_KV[which]))
            for leaf in ("weight", "bias")
        ]
    if config.pos_embed_seq_len:
        pairs.append(("image.positions", _POSITIONS[which]))
    for ours, names in pairs:
        yield Row(ours, names, Cat() if isinstance(names, tuple) else reshapes.get(ours, Same()))


def _reshapes(config: Wan21Config) -> Mapping[str, Op]:
    """Return what both layouts keep in another shape: a convolution's kernel, and tables with a leading 1."""
    width, channels, patch = config.width, config.in_channels, config.patch_size
    kernel = (width, channels, *patch)
    out: dict[str, Op] = {
        "patches.proj.weight": Reshape(kernel, (width, channels * patch[0] * patch[1] * patch[2])),
        "blocks.*.modulation.table": Reshape((1, 6, width), (6, width)),
        "head.modulation.table": Reshape((1, 2, width), (2, width)),
    }
    if config.pos_embed_seq_len and config.image_dim:
        shape = (config.pos_embed_seq_len, config.image_dim)
        out["image.positions"] = Reshape((1, *shape), shape)
    return out


# ------------------------------------------------------------------------------------------------ hub

_NETWORK = PipelineNetwork(
    "WanTransformer3DModel", "Wan2.1", {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
)


def read_hub_config(folder: Path) -> Wan21Config:
    """Read the transformer's config.json; UserError names a setting that Wan2.1 does not have."""
    path, raw = _NETWORK.config(folder), _NETWORK.read(folder)
    values = {key: raw[key] for key in Wan21Config.model_fields if raw.get(key) is not None}
    config = validate(Wan21Config, values, str(path))
    if raw.get("added_kv_proj_dim") != _added(config):
        said = raw.get("added_kv_proj_dim")
        raise UserError(f"{path}: added_kv_proj_dim={said!r} is not supported, Wan2.1 has {_added(config)} here")
    return config


def write_hub_config(config: Wan21Config, folder: Path, dtype: torch.dtype) -> None:
    """Write the transformer's config.json as diffusers does."""
    _NETWORK.write(folder, {**config.model_dump(mode="json"), "added_kv_proj_dim": _added(config)})


def _added(config: Wan21Config) -> int | None:
    return config.width if config.image_dim else None


_PARTS = {
    "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", _NETWORK.kind),
    "vae": ("diffusers", "AutoencoderKLWan"),
}
_IMAGE_PARTS = {
    "image_encoder": ("transformers", "CLIPVisionModel"),
    "image_processor": ("transformers", "CLIPImageProcessor"),
}


def complete_hub(config: Wan21Config, folder: Path) -> None:
    """Make the folder one of diffusers' pipelines, if its parts are there."""
    kind = "WanImageToVideoPipeline" if config.image_dim else "WanPipeline"
    scheduler = {
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": config.shift,
    }
    complete_pipeline(folder, kind, {**_PARTS, **(_IMAGE_PARTS if config.image_dim else {})}, scheduler)


def _from_release(config: Wan21Config, origin: Path) -> Callable[[Path], None] | None:
    """Plan the translation of an original release's frozen parts, if it has them."""
    from .auxiliary import translate

    return translate(origin, image=config.image_dim is not None)


HUB = _NETWORK.layout(
    build=Wan21,
    table=lambda config: Table(*_rows(config, _HUB)),
    read_config=read_hub_config,
    write_config=write_hub_config,
    loose=("rope_max_seq_len",),
    extras=("model_index.json",),
    parts=(*_PARTS, *_IMAGE_PARTS),
    companions=_from_release,
    complete=complete_hub,
)

# ------------------------------------------------------------------------------------------------ original

_FIELDS = {
    "num_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "ffn_dim": "ffn_dim",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "freq_dim": "freq_dim",
    "eps": "eps",
}
_FILES = Safetensors("diffusion_pytorch_model")


def _is_original(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("_class_name") == "WanModel"


def read_original_config(folder: Path) -> Wan21Config:
    """Read the release's config.json; the widths of text and image, which it does not state, come from the tensors."""
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("text_len", TEXT_TOKENS) != TEXT_TOKENS:
        raise UserError(f"{path}: text_len={raw['text_len']!r} is not supported, Wan2.1 has {TEXT_TOKENS}")
    values = {ours: raw[theirs] for ours, theirs in _FIELDS.items() if theirs in raw}
    for key in ("dim", "num_heads"):
        if not isinstance(raw.get(key), int) or raw[key] < 1:
            raise UserError(f"{path}: {key}={raw.get(key)!r}: expected a positive whole number")
    if raw["dim"] % raw["num_heads"]:
        raise UserError(f"{path}: dim={raw['dim']} does not divide by num_heads={raw['num_heads']}")
    values["attention_head_dim"] = raw["dim"] // raw["num_heads"]
    size = Sizes(folder, _FILES.open(folder))
    values["text_dim"] = size("text_embedding.0.weight", 1)
    if raw.get("model_type", "t2v") != "t2v":
        values["image_dim"] = size("img_emb.proj.0.weight", 0)
        if _POSITIONS[_ORIGINAL] in size:
            values["pos_embed_seq_len"] = size(_POSITIONS[_ORIGINAL], 1)
    return validate(Wan21Config, values, str(path))


def write_original_config(config: Wan21Config, folder: Path, dtype: torch.dtype) -> None:
    """Write the config.json of the original release."""
    kind = {"none": "t2v", "first": "i2v", "first-last": "flf2v"}[config.conditioning]
    raw = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    write_json(
        folder / "config.json",
        {"_class_name": "WanModel", "model_type": kind, "dim": config.width, "text_len": TEXT_TOKENS, **raw},
    )


def _as_release(config: Wan21Config, origin: Path) -> Callable[[Path], None] | None:
    """Plan the translation of the frozen parts of a folder in diffusers' layout, if it has them."""
    from .auxiliary import restore

    return restore(origin, image=config.image_dim is not None)


ORIGINAL = Layout(
    name="original",
    describe="config.json of WanModel with diffusion_pytorch_model.safetensors",
    build=Wan21,
    table=lambda config: Table(*_rows(config, _ORIGINAL)),
    detect=_is_original,
    read_config=read_original_config,
    write_config=write_original_config,
    files=_FILES,
    silent=("rope_max_seq_len", "patch_size"),
    extras=(
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    ),
    parts=("google/umt5-xxl",),
    companions=_as_release,
)

LAYOUTS = (HUB, ORIGINAL)
