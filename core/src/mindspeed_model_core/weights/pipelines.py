"""Folders of diffusers' pipelines: the configuration of a network in one, and the files that describe the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import check_fixed, read_json, write_json
from .layout import DIFFUSERS, Layout
from .tensorfile import Safetensors

VERSION = "0.35.0"
"""The version of diffusers whose files are written."""

_FOLDER = "transformer"
_CONFIG = f"{_FOLDER}/config.json"
_STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class PipelineNetwork:
    """A network of diffusers' class ``kind``: in ``transformer/`` of a pipeline's folder, or in a folder of its own.

    ``fixed`` are the settings that all its sizes share, ``whose`` is the model as errors call it.
    """

    kind: str
    whose: str
    fixed: Mapping[str, Any]

    def config(self, folder: Path) -> Path:
        """Return the path of the configuration, in whichever place it is."""
        folder = folder.absolute()  # what is around a network is looked for in the folder above
        return folder / _CONFIG if (folder / _CONFIG).is_file() else folder / "config.json"

    def detect(self, folder: Path) -> bool:
        """Whether a folder holds such a network."""
        path = self.config(folder)
        return path.is_file() and read_json(path).get("_class_name") == self.kind

    def read(self, folder: Path) -> dict[str, Any]:
        """Return the configuration; UserError names a setting that the model does not have."""
        path = self.config(folder)
        raw = read_json(path)
        check_fixed(raw, self.fixed, path, self.whose)
        return raw

    def write(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Write the configuration into a pipeline's folder as diffusers does."""
        said = {"_class_name": self.kind, "_diffusers_version": VERSION, **settings, **self.fixed}
        write_json(folder / _CONFIG, said)

    def layout(self, *, parts: Iterable[str], **settings: Any) -> Layout:
        """Return the layout of a pipeline's folder with these ``parts``; ``settings`` are the other fields of it."""
        return Layout(
            name="hub",
            describe=f"{_CONFIG} with {_FOLDER}/{_STEM}.safetensors",
            detect=self.detect,
            files=Safetensors(_STEM, _FOLDER),
            config_file=_CONFIG,
            parts=tuple(part for part in parts if part != _FOLDER),
            adapter=DIFFUSERS,
            **settings,
        )


def complete_pipeline(
    folder: Path, kind: str, parts: Mapping[str, tuple[str, str]], scheduler: Mapping[str, Any]
) -> None:
    """Write model_index.json and the scheduler: a folder becomes one of diffusers' pipelines, if its parts are there.

    ``parts`` maps subfolders to library and class; ``scheduler`` are the settings of the one among them, where the
    folder has none.
    """
    if any(not (folder / part).is_dir() for part in parts if part != "scheduler"):
        return
    versions = {"_diffusers_version": VERSION}
    if not (folder / "scheduler").exists():
        (folder / "scheduler").mkdir()
        said = {"_class_name": parts["scheduler"][1], **versions, **scheduler}
        write_json(folder / "scheduler" / "scheduler_config.json", said)
    if not (folder / "model_index.json").exists():
        index = {"_class_name": kind, **versions, **{part: list(names) for part, names in parts.items()}}
        write_json(folder / "model_index.json", index)
