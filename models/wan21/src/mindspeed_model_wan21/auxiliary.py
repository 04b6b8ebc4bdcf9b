"""The frozen parts of the original release, and the same in diffusers' layout: the VAE, UMT5 and CLIP's vision tower.

Each has a table in both directions, under the parameter names of its diffusers or transformers class; that class, built
without memory, says which tensors there must be.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.layout import Bound, Cat, Layout, Reshape, Row, Same, Source, Table
from mindspeed_model_core.recipe import Section, validate
from mindspeed_model_core.tensorfile import Reader, Safetensors, Spec, TorchFile, read_json, write_json
from mindspeed_model_core.weights import Opened, check, read, whole
from pydantic import PositiveInt
from torch import nn

_DIFFUSERS = "0.35.0"
_SHARD_BYTES = 5_000_000_000
S = TypeVar("S", bound=Section)


class _Sizes:
    """The sizes of a release's tensors, from which its configuration follows: the files state none."""

    def __init__(self, folder: Path, files: TorchFile) -> None:
        self.path, self._tensors = folder / files.name, files.open(folder)
        self._names = set(self._tensors.names())

    def __call__(self, name: str, dim: int) -> int:
        """Return a tensor's size along ``dim``; UserError if the file lacks it."""
        self.need(name)
        shape = self._tensors.shape(name)
        if dim >= len(shape):
            raise UserError(f"{self.path}: {name}: has shape {list(shape)}, expected at least {dim + 1} dims")
        return shape[dim]

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def need(self, name: str) -> None:
        """Raise UserError if the file lacks a tensor."""
        if name not in self._names:
            raise UserError(f"{self.path}: missing key {name!r}")

    def count(self, stem: str) -> int:
        """Return how many modules of a list there are, the highest number among them plus one."""
        numbers = re.compile(re.escape(stem) + r"\.(\d+)\.")
        return 1 + max((int(m[1]) for name in self._names if (m := numbers.match(name))), default=-1)


def _read_config(kind: type[S], fixed: Mapping[str, Any], path: Path) -> S:
    """Read a part's config.json; UserError names a setting in which it is not Wan2.1's."""
    raw = read_json(path)
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            raise UserError(f"{path}: {key}={raw[key]!r} is not supported, Wan2.1 has {key}={value!r}")
    return validate(kind, {key: raw[key] for key in kind.model_fields if key in raw}, str(path))


def _dtype(dtype: torch.dtype) -> dict[str, str]:
    """Return what transformers 4 and 5 call the type of the weights."""
    name = str(dtype).removeprefix("torch.")
    return {"torch_dtype": name, "dtype": name}


def _parameters(build: Callable[[Any], nn.Module], config: Any) -> list[str]:
    return list(whole(build, config)[0])


# ------------------------------------------------------------------------------------------------ VAE


class VaeConfig(Section):
    """Sizes of the VAE under diffusers' field names (AutoencoderKLWan)."""

    base_dim: PositiveInt
    dim_mult: tuple[PositiveInt, ...]
    num_res_blocks: PositiveInt
    temperal_downsample: tuple[bool, ...]


# The statistics normalise the 16 latent channels; the release has them in its code (wan/modules/vae.py).
_VAE_FIXED: dict[str, Any] = {
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

    return AutoencoderKLWan(**config.model_dump(mode="json"), **_VAE_FIXED)


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
    for name in _parameters(_build_vae, config):
        stem = next(m for m in modules if name.startswith(f"{m}."))
        inner, dot, leaf = name.removeprefix(f"{stem}.").partition(".")
        yield Row(name, f"{modules[stem]}.{_RESIDUAL.get(inner, inner)}{dot}{leaf}")


def read_original_vae(folder: Path) -> VaeConfig:
    """Derive the VAE's sizes from the tensors of ``Wan2.1_VAE.pth``; UserError names a key it lacks."""
    size = _Sizes(folder, _VAE_FILE)
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


def _write_vae(config: VaeConfig, folder: Path, dtype: torch.dtype) -> None:
    write_json(
        folder / "vae" / "config.json",
        {
            "_class_name": "AutoencoderKLWan",
            "_diffusers_version": _DIFFUSERS,
            **config.model_dump(mode="json"),
            **_VAE_FIXED,
            "scale_factor_temporal": 2 ** sum(config.temperal_downsample),
            "scale_factor_spatial": 2 ** len(config.temperal_downsample),
        },
    )


VAE_HUB = Layout(
    name="vae",
    build=_build_vae,
    table=lambda config: Table(*(Row(name, name) for name in _parameters(_build_vae, config))),
    detect=lambda folder: (folder / "vae").is_dir(),
    read_config=lambda folder: _read_config(VaeConfig, _VAE_FIXED, folder / "vae" / "config.json"),
    write_config=_write_vae,
    files=Safetensors("diffusion_pytorch_model", "vae"),
    config_file="vae/config.json",
)
VAE_ORIGINAL = Layout(
    name=_VAE_FILE.name,
    build=_build_vae,
    table=lambda config: Table(*_vae_rows(config)),
    detect=lambda folder: (folder / _VAE_FILE.name).is_file(),
    read_config=read_original_vae,
    write_config=lambda config, folder, dtype: None,
    files=_VAE_FILE,
    config_file=_VAE_FILE.name,
)

# ------------------------------------------------------------------------------------------------ text encoder


class TextConfig(Section):
    """Sizes of the UMT5 encoder under transformers' field names."""

    vocab_size: PositiveInt
    d_model: PositiveInt
    d_kv: PositiveInt
    d_ff: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    relative_attention_num_buckets: PositiveInt


_TEXT_FIXED: dict[str, Any] = {
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    "relative_attention_max_distance": 128,
}
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

    return UMT5EncoderModel(UMT5Config(**config.model_dump(), **_TEXT_FIXED))


def read_original_text(folder: Path) -> TextConfig:
    """Derive UMT5's sizes from the tensors of the release's file; the relative bias tells the number of heads."""
    size = _Sizes(folder, _TEXT_FILE)
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


def _write_text(config: TextConfig, folder: Path, dtype: torch.dtype) -> None:
    write_json(
        folder / "text_encoder" / "config.json",
        {
            "architectures": ["UMT5EncoderModel"],
            "model_type": "umt5",
            **config.model_dump(),
            **_TEXT_FIXED,
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
            **_dtype(dtype),
        },
    )


TEXT_HUB = Layout(
    name="text_encoder",
    build=_build_text,
    # The encoder's own table is the shared one again, which some folders repeat.
    table=lambda config: Table(
        *(Row(f"{ours}.weight", f"{ours}.weight") for ours in _TEXT), ignore=("encoder.embed_tokens.weight",)
    ),
    detect=lambda folder: (folder / "text_encoder").is_dir(),
    read_config=lambda folder: _read_config(TextConfig, _TEXT_FIXED, folder / "text_encoder" / "config.json"),
    write_config=_write_text,
    files=Safetensors("model", "text_encoder"),
    config_file="text_encoder/config.json",
)
TEXT_ORIGINAL = Layout(
    name=_TEXT_FILE.name,
    build=_build_text,
    table=lambda config: Table(*(Row(f"{ours}.weight", f"{theirs}.weight") for ours, theirs in _TEXT.items())),
    detect=lambda folder: (folder / _TEXT_FILE.name).is_file(),
    read_config=read_original_text,
    write_config=lambda config, folder, dtype: None,
    files=_TEXT_FILE,
    config_file=_TEXT_FILE.name,
)

# ------------------------------------------------------------------------------------------------ image encoder


class ImageConfig(Section):
    """Sizes of CLIP's vision tower under transformers' field names."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    image_size: PositiveInt
    patch_size: PositiveInt
    projection_dim: PositiveInt = 1024


_IMAGE_FIXED: dict[str, Any] = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "num_channels": 3,
}
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

    net: Any = CLIPVisionModel(CLIPVisionConfig(**config.model_dump(), **_IMAGE_FIXED))
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


def read_original_image(folder: Path, heads: int | None = None) -> ImageConfig:
    """Derive the vision tower's sizes from the release's file; ``heads`` defaults to the published 80 wide ones."""
    size = _Sizes(folder, _IMAGE_FILE)
    width, patch = size("visual.cls_embedding", 2), size("visual.patch_embedding.weight", 2)
    if width % (heads or _HEAD_DIM):
        rule = f"{heads} heads" if heads else f"heads of {_HEAD_DIM} as CLIP ViT-H/14's are"
        raise UserError(f"{size.path}: visual.cls_embedding: its width of {width} does not divide into {rule}")
    return validate(
        ImageConfig,
        {
            "hidden_size": width,
            "intermediate_size": size("visual.transformer.0.mlp.0.weight", 0),
            "num_hidden_layers": size.count("visual.transformer"),
            "num_attention_heads": heads or width // _HEAD_DIM,
            "image_size": patch * math.isqrt(size("visual.pos_embedding", 1) - 1),
            "patch_size": patch,
            **({"projection_dim": size("visual.head", 1)} if "visual.head" in size else {}),
        },
        str(size.path),
    )


def _write_image(config: ImageConfig, folder: Path, dtype: torch.dtype) -> None:
    write_json(
        folder / "image_encoder" / "config.json",
        {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            **config.model_dump(),
            **_IMAGE_FIXED,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            **_dtype(dtype),
        },
    )
    (folder / "image_processor").mkdir()
    write_json(
        folder / "image_processor" / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": config.image_size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": config.image_size, "width": config.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )


IMAGE_HUB = Layout(
    name="image_encoder",
    build=_build_image,
    table=_image_hub_table,
    detect=lambda folder: (folder / "image_encoder").is_dir(),
    read_config=lambda folder: _read_config(ImageConfig, _IMAGE_FIXED, folder / "image_encoder" / "config.json"),
    write_config=_write_image,
    files=_ImageFiles("model", "image_encoder"),
    config_file="image_encoder/config.json",
)
IMAGE_ORIGINAL = Layout(
    name=_IMAGE_FILE.name,
    build=_build_image,
    table=_image_original_table,
    detect=lambda folder: (folder / _IMAGE_FILE.name).is_file(),
    read_config=read_original_image,
    write_config=lambda config, folder, dtype: None,
    files=_IMAGE_FILE,
    config_file=_IMAGE_FILE.name,
)

# ------------------------------------------------------------------------------------------------ both ways

_TOKENIZER_HUB = "tokenizer"
_TOKENIZER_ORIGINAL = "google/umt5-xxl"


def has_frozen(source: Path) -> bool:
    """Return whether an original release holds any of the frozen parts' weights."""
    return any(layout.detect(source) for layout in (VAE_ORIGINAL, TEXT_ORIGINAL, IMAGE_ORIGINAL))


def translate(
    source: Path,
    destination: Path,
    *,
    clip_heads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the frozen parts of an original release into ``destination``, a folder, in diffusers' layout.

    They are ``vae/``, ``text_encoder/``, ``tokenizer/`` and, where the release has CLIP, ``image_encoder/`` and
    ``image_processor/``. Types and bits stay, memory is about one tensor, ``progress(done, total)`` counts bytes.
    ``clip_heads`` is for a CLIP whose heads are not 80 wide, which its tensors do not tell. UserError, before anything
    is written, names a file or key that is missing or wrong; what a later failure leaves is the caller's to remove.
    """
    image = replace(IMAGE_ORIGINAL, read_config=partial(read_original_image, heads=clip_heads))
    pairs = [(VAE_ORIGINAL, VAE_HUB), (TEXT_ORIGINAL, TEXT_HUB)]
    pairs += [(image, IMAGE_HUB)] if image.detect(source) else []
    _move(source, destination, pairs, (_TOKENIZER_ORIGINAL, _TOKENIZER_HUB), progress)


def restore(source: Path, destination: Path, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the frozen parts of a folder in diffusers' layout into ``destination``, as the original release has them.

    It undoes ``translate``, except that CLIP's file holds only the vision tower without its head: no more of it is in
    diffusers' layout, and Wan2.1 computes with no more. Errors are those of ``translate``.
    """
    pairs = [(VAE_HUB, VAE_ORIGINAL), (TEXT_HUB, TEXT_ORIGINAL)]
    pairs += [(IMAGE_HUB, IMAGE_ORIGINAL)] if IMAGE_HUB.detect(source) else []
    _move(source, destination, pairs, (_TOKENIZER_HUB, _TOKENIZER_ORIGINAL), progress)


def _move(
    source: Path,
    destination: Path,
    pairs: list[tuple[Layout, Layout]],
    tokenizer: tuple[str, str],
    progress: Callable[[int, int], None] | None,
) -> None:
    here, there = (folder / name for folder, name in zip((source, destination), tokenizer, strict=True))
    if not here.is_dir():
        raise UserError(f"{here}: no such folder; it holds UMT5's tokenizer")
    for made in (there, *(destination / layout.name for _, layout in pairs)):
        if os.path.lexists(made):
            raise UserError(f"{made}: exists; choose another destination")
    moves = [_plan(source, *pair) for pair in pairs]
    total, done = sum(move.nbytes for move in moves), 0
    for move in moves:
        for nbytes in move.run(destination):
            done += nbytes
            if progress:
                progress(done, total)
    there.mkdir(parents=True)
    for file in sorted(here.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            shutil.copyfile(file, there / file.name)


@dataclass(frozen=True)
class _Move:
    """A part on its way: its tensors, and each parameter as the one layout has it and the other will."""

    config: Section
    tensors: Source
    layout: Layout
    bounds: Mapping[str, tuple[Bound, Bound]]
    specs: Mapping[str, Spec]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def run(self, folder: Path) -> Iterator[int]:
        """Write the part, yielding the bytes of each parameter."""
        writer = self.layout.files.create(folder, self.specs, shards=1, shard_bytes=_SHARD_BYTES)
        try:
            for here, there in self.bounds.values():
                for name, tensor in there.split(read(self.tensors, here)):
                    writer.write(name, tensor)
                yield sum(self.specs[part.name].nbytes for part in there.parts)
            writer.finish()
        finally:
            writer.close()
        common = max(self.specs.values(), key=lambda spec: spec.nbytes).dtype
        self.layout.write_config(self.config, folder, common)


def _plan(source: Path, here: Layout, there: Layout) -> _Move:
    """Check that a part is whole, reading no weights."""
    config = here.read_config(source)
    tensors, table = here.files.open(source), here.table(config)
    shapes, _ = whole(here.build, config)
    bounds, goals = table.bind(shapes), there.table(config).bind(shapes)
    check(Opened(source / here.name, config, table, tensors, here), bounds)
    specs = {
        part.name: Spec(tensors.dtype(bounds[name].parts[0].name), part.shape)
        for name, goal in goals.items()
        for part in goal.parts
    }
    return _Move(config, tensors, there, {name: (bounds[name], goals[name]) for name in goals}, specs)
