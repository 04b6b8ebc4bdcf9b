"""FLUX.1's weight tables: diffusers' layout, and Black Forest Labs' single file, in which projections are stacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.files import read_json
from mindspeed_model_core.recipe import validate
from mindspeed_model_core.weights.layout import Cat, Layout, Row, Same, SwapHalves, Table
from mindspeed_model_core.weights.pipelines import PipelineNetwork, complete_pipeline
from mindspeed_model_core.weights.tensorfile import Reader, Safetensors, Spec, Writer
from mindspeed_model_core.weights.translation import Sizes

from .config import PRESETS, FluxConfig
from .model import Flux

_HUB, _ORIGINAL = 0, 1
_EMBEDDER = "time_text_embed."
# Our modules with weight and bias, and their name in diffusers' and in the original layout. Several names: they are
# stacked in ours. Blocks of two streams and of one are apart in both layouts, and follow each other here.
_ENDS: dict[str, tuple[str, str]] = {
    "image": ("x_embedder", "img_in"),
    "text": ("context_embedder", "txt_in"),
    "time.up": (_EMBEDDER + "timestep_embedder.linear_1", "time_in.in_layer"),
    "time.out": (_EMBEDDER + "timestep_embedder.linear_2", "time_in.out_layer"),
    "pooled.up": (_EMBEDDER + "text_embedder.linear_1", "vector_in.in_layer"),
    "pooled.out": (_EMBEDDER + "text_embedder.linear_2", "vector_in.out_layer"),
    "head.proj": ("proj_out", "final_layer.linear"),
}
_GUIDANCE: dict[str, tuple[str, str]] = {
    "guidance.up": (_EMBEDDER + "guidance_embedder.linear_1", "guidance_in.in_layer"),
    "guidance.out": (_EMBEDDER + "guidance_embedder.linear_2", "guidance_in.out_layer"),
}
_FINAL = ("norm_out.linear", "final_layer.adaLN_modulation.1")
_DOUBLE: dict[str, tuple[str | tuple[str, ...], str]] = {
    "modulation": ("norm1.linear", "img_mod.lin"),
    "text_modulation": ("norm1_context.linear", "txt_mod.lin"),
    "attention.qkv": (("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv"),
    "attention.text_qkv": (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv"),
    "attention.out": ("attn.to_out.0", "img_attn.proj"),
    "attention.text_out": ("attn.to_add_out", "txt_attn.proj"),
    "mlp.up": ("ff.net.0.proj", "img_mlp.0"),
    "mlp.down": ("ff.net.2", "img_mlp.2"),
    "text_mlp.up": ("ff_context.net.0.proj", "txt_mlp.0"),
    "text_mlp.down": ("ff_context.net.2", "txt_mlp.2"),
}
_DOUBLE_NORMS = {
    "attention.q_norm.weight": ("attn.norm_q.weight", "img_attn.norm.query_norm.scale"),
    "attention.k_norm.weight": ("attn.norm_k.weight", "img_attn.norm.key_norm.scale"),
    "attention.text_q_norm.weight": ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
    "attention.text_k_norm.weight": ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
}
_SINGLE: dict[str, tuple[str | tuple[str, ...], str]] = {
    "modulation": ("norm.linear", "modulation.lin"),
    "qkv_up": (("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1"),
    "out_down": ("proj_out", "linear2"),
}
_SINGLE_NORMS = {
    "q_norm.weight": ("attn.norm_q.weight", "norm.query_norm.scale"),
    "k_norm.weight": ("attn.norm_k.weight", "norm.key_norm.scale"),
}
_DOUBLES = ("transformer_blocks", "double_blocks")
_SINGLES = ("single_transformer_blocks", "single_blocks")


def _rows(config: FluxConfig, which: int) -> Iterator[Row]:
    for ours, theirs in {**_ENDS, **(_GUIDANCE if config.guidance_embeds else {})}.items():
        yield from _layer(ours, theirs[which], ())
    # The release's shift comes before the scale, diffusers' and ours behind it.
    for leaf in ("weight", "bias"):
        swap = SwapHalves() if which == _ORIGINAL else Same()
        yield Row(f"head.modulation.{leaf}", f"{_FINAL[which]}.{leaf}", swap)
    for number in range(config.num_layers):
        yield from _block(f"blocks.{number}", f"{_DOUBLES[which]}.{number}", which, _DOUBLE, _DOUBLE_NORMS, ())
    sizes = (config.width,) * 3 + (config.hidden,)
    for number in range(config.num_single_layers):
        ours = f"blocks.{config.num_layers + number}"
        yield from _block(ours, f"{_SINGLES[which]}.{number}", which, _SINGLE, _SINGLE_NORMS, sizes)


def _block(
    ours: str,
    theirs: str,
    which: int,
    table: Mapping[str, tuple[str | tuple[str, ...], str]],
    norms: Mapping[str, tuple[str, str]],
    sizes: tuple[int, ...],
) -> Iterator[Row]:
    for name, names in table.items():
        found = names[which]
        full = f"{theirs}.{found}" if isinstance(found, str) else tuple(f"{theirs}.{each}" for each in found)
        yield from _layer(f"{ours}.{name}", full, sizes)
    for name, pair in norms.items():
        yield Row(f"{ours}.{name}", f"{theirs}.{pair[which]}")


def _layer(ours: str, theirs: str | tuple[str, ...], sizes: tuple[int, ...]) -> Iterator[Row]:
    for leaf in ("weight", "bias"):
        if isinstance(theirs, str):
            yield Row(f"{ours}.{leaf}", f"{theirs}.{leaf}")
        else:
            yield Row(f"{ours}.{leaf}", tuple(f"{each}.{leaf}" for each in theirs), Cat(sizes=sizes))


# ------------------------------------------------------------------------------------------------ hub

_NETWORK = PipelineNetwork("FluxTransformer2DModel", "FLUX.1", {"patch_size": 1, "out_channels": None})
_FIELDS = tuple(name for name in FluxConfig.model_fields if name != "kontext")
_PIPELINE, _KONTEXT = "FluxPipeline", "FluxKontextPipeline"


def read_hub_config(folder: Path) -> FluxConfig:
    """Read the transformer's config.json, and whether the pipeline around it is Kontext's.

    UserError names a setting that FLUX.1 does not have.
    """
    path, raw = _NETWORK.config(folder), _NETWORK.read(folder)
    # diffusers' own default is that of schnell.
    values = {"guidance_embeds": False} | {key: raw[key] for key in _FIELDS if raw.get(key) is not None}
    index = _index(folder)
    values["kontext"] = index.is_file() and read_json(index).get("_class_name") == _KONTEXT
    return validate(FluxConfig, values, str(path))


def _index(folder: Path) -> Path:
    return _NETWORK.config(folder).parent.parent / "model_index.json"


def is_bare(folder: Path) -> bool:
    """Whether a folder holds a transformer without a pipeline around it, which would say whether it is Kontext's."""
    return HUB.detect(folder) and not _index(folder).is_file()


def write_hub_config(config: FluxConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write the transformer's config.json as diffusers does."""
    _NETWORK.write(folder, config.model_dump(mode="json", include=set(_FIELDS)))


_PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", _NETWORK.kind),
    "vae": ("diffusers", "AutoencoderKL"),
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""What dev and Kontext are sampled with: levels shifted towards noise by an image's number of tokens."""


def scheduler(config: FluxConfig) -> dict[str, Any]:
    """Return the settings of the release's scheduler; schnell's levels are not shifted."""
    return SCHEDULER if config.guidance_embeds else {**SCHEDULER, "shift": 1.0, "use_dynamic_shifting": False}


def complete_hub(config: FluxConfig, folder: Path) -> None:
    """Make the folder one of diffusers' pipelines, if its parts are there."""
    complete_pipeline(folder, _KONTEXT if config.kontext else _PIPELINE, _PARTS, scheduler(config))


HUB = _NETWORK.layout(
    build=Flux,
    table=lambda config: Table(*_rows(config, _HUB)),
    read_config=read_hub_config,
    write_config=write_hub_config,
    loose=("kontext",),
    parts=_PARTS,
    complete=complete_hub,
)

# ------------------------------------------------------------------------------------------------ original

_STEM, _KONTEXT_STEM, _SCHNELL_STEM = "flux1-dev", "flux1-kontext-dev", "flux1-schnell"
_STEMS = (_STEM, _KONTEXT_STEM, _SCHNELL_STEM)


@dataclass(frozen=True)
class Release:
    """A folder with one of the release's files, which are named after the network."""

    def find(self, folder: Path) -> Path | None:
        """Return the file, or None; UserError where there are several."""
        found = [path for stem in _STEMS if (path := folder / f"{stem}.safetensors").is_file()]
        if len(found) > 1:
            raise UserError(f"{folder}: holds {found[0].name} and {found[1].name}; leave one")
        return found[0] if found else None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The paths of the files, in the folder."""
        return tuple(f"{stem}.safetensors" for stem in _STEMS)

    def open(self, folder: Path) -> Reader:
        """Read the file's header; UserError if there is none."""
        found = self.find(folder)
        if found is None:
            raise UserError(f"{folder}: holds none of {', '.join(self.patterns)}")
        return Safetensors(found.stem).open(folder)

    def create(self, folder: Path, specs: Mapping[str, Spec], *, shards: int, shard_bytes: int) -> Writer:
        """Lay out the file, whatever its size: the release has no index."""
        whole = sum(spec.nbytes for spec in specs.values())
        return Safetensors(_STEM).create(folder, specs, shards=1, shard_bytes=whole)


_RELEASE = Release()


def read_original_config(folder: Path) -> FluxConfig:
    """Derive the sizes from the tensors; what they do not tell, the split of heads over axes, is that of dev.

    UserError names a key that is missing.
    """
    found = _RELEASE.find(folder) or folder / f"{_STEM}.safetensors"
    size = Sizes(found, _RELEASE.open(folder))
    head = size("double_blocks.0.img_attn.norm.query_norm.scale", 0)
    width = size("img_in.weight", 0)
    if width % head:
        raise UserError(f"{found}: img_in.weight has {width} rows, which heads of {head} do not divide")
    axes = next((preset.axes_dims_rope for preset in PRESETS.values() if preset.attention_head_dim == head), None)
    if axes is None:
        raise UserError(f"{found}: has heads of {head} elements, FLUX.1 has {PRESETS['dev'].attention_head_dim}")
    values = {
        "num_layers": size.count("double_blocks"),
        "num_single_layers": size.count("single_blocks"),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": size("img_in.weight", 1),
        "joint_attention_dim": size("txt_in.weight", 1),
        "pooled_projection_dim": size("vector_in.in_layer.weight", 1),
        "guidance_embeds": "guidance_in.in_layer.weight" in size,
        "axes_dims_rope": axes,
        "kontext": found.stem == _KONTEXT_STEM,
    }
    return validate(FluxConfig, values, str(found))


def _name_release(config: FluxConfig, folder: Path) -> None:
    stem = _KONTEXT_STEM if config.kontext else _STEM if config.guidance_embeds else _SCHNELL_STEM
    (folder / f"{_STEM}.safetensors").rename(folder / f"{stem}.safetensors")


ORIGINAL = Layout(
    name="original",
    describe="flux1-dev.safetensors, flux1-kontext-dev.safetensors or flux1-schnell.safetensors",
    build=Flux,
    table=lambda config: Table(*_rows(config, _ORIGINAL)),
    detect=lambda folder: _RELEASE.find(folder) is not None,
    read_config=read_original_config,
    write_config=lambda config, folder, dtype: None,
    files=_RELEASE,
    config_file=f"{_STEM}.safetensors",
    loose=("kontext",),
    extras=("ae.safetensors",),
    complete=_name_release,
)

LAYOUTS = (HUB, ORIGINAL)
