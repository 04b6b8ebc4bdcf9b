"""The weight table of the hub layout."""

from __future__ import annotations

from pathlib import Path

import torch
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.files import read_json, write_json
from mindspeed_model_core.recipe import validate
from mindspeed_model_core.weights.layout import Cat, Layout, Row, Table
from mindspeed_model_core.weights.tensorfile import Safetensors

from .config import TemplateConfig
from .model import Template

MODEL_TYPE = "template"


def hub_table(config: TemplateConfig) -> Table:
    """Return the table of the published files' names."""
    return Table(
        Row("table.weight", "embedding.weight"),
        Row("blocks.*.norm.weight", "layers.*.norm.weight"),
        Row("blocks.*.mlp.gate_up.weight", ("layers.*.gate.weight", "layers.*.up.weight"), Cat()),
        Row("blocks.*.mlp.down.weight", "layers.*.down.weight"),
        Row("norm.weight", "norm.weight"),
        Row("head.weight", "head.weight"),
    )


def read_hub_config(folder: Path) -> TemplateConfig:
    """Read config.json; UserError names what is wrong with it."""
    path = folder / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != MODEL_TYPE:
        raise UserError(f"{path}: model_type={raw.get('model_type')!r} is not supported, expected {MODEL_TYPE!r}")
    values = {key: raw[key] for key in TemplateConfig.model_fields if key in raw}
    return validate(TemplateConfig, values, str(path))  # type: ignore[type-var]


def write_hub_config(config: TemplateConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json."""
    name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", {"model_type": MODEL_TYPE, **config.model_dump(), "dtype": name})


HUB = Layout(
    name="hub",
    describe="config.json with model.safetensors",
    build=Template,
    table=hub_table,
    detect=lambda folder: (folder / "config.json").is_file(),
    read_config=read_hub_config,
    write_config=write_hub_config,
    files=Safetensors(),
    loose=("initializer_range",),
)

LAYOUTS = (HUB,)
