"""Readers of encoded samples in buckets: prepared folders, lists of feature files, and random ones to measure with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..files import publish, save_tensors
from ..trunk import Batch
from .clips import BadFiles, PictureData, Sample, content, drops_text, naming
from .features import INDEX, FeatureSet, Shape
from .media import check_file
from .noise import noise
from .ranks import spread

EMPTY_TEXT = "empty_text.safetensors"
"""The file of a prepared folder that holds what the empty caption was encoded to."""

Collate = Callable[[list[Sample]], Batch]
Check = Callable[[str, Mapping[str, Shape]], None]
"""Raises UserError, beginning with the place it is given, for a sample of shapes that the network cannot take."""


def open_prepared(folder: Path) -> FeatureSet:
    """Return the samples of a folder made by ``prepare``; UserError if it is not finished or holds none."""
    found = FeatureSet(folder)
    if not found.finished:
        raise UserError(f"{folder}: is not finished; run the prepare command again to go on")
    if not len(found):
        raise UserError(f"{folder}: holds no sample")
    return found


def check_settings(features: FeatureSet, data: PictureData) -> None:
    """Raise UserError for a shape that a recipe sets and the folder was prepared with another: it would be no setting.

    What the recipe leaves out is the folder's.
    """
    of = {"sizes": ("height", "width", "ratios", "multiple"), "frames": ("frames",), "fps": ("fps",)}
    for name, wanted in data.shapes.items():
        had, given = (
            features.meta.get(name),
            [field for field in of.get(name, (name,)) if field in data.model_fields_set],
        )
        if had is not None and given and had != wanted:
            shown = ", ".join(f"data.{field}={getattr(data, field)}" for field in given)
            what = f"{name} (height, width)" if name == "sizes" else name
            raise UserError(
                f"{shown}: {features.folder} was prepared with {what} {had}, not {wanted}; set what it has, or prepare "
                "the samples again into another folder"
            )


class PreparedFeatures:
    """Reads the tensors ``names`` of a prepared folder's samples; ``key`` names the one whose shape is the bucket.

    A sample that goes without its text has, for those of its tensors that ``EMPTY_TEXT`` holds, these. A damaged shard
    is no bad sample but a damaged folder: ``data.on_bad`` does not leave it out.
    """

    def __init__(
        self,
        features: FeatureSet,
        data: PictureData,
        collate: Collate,
        *,
        names: tuple[str, ...],
        check: Check,
        key: str = "latents",
    ) -> None:
        check_settings(features, data)
        self.features, self.names, self.collate, self.text_drop = features, names, collate, data.text_drop
        self.empty = read_empty_text(features.folder) if data.text_drop else {}
        if data.text_drop and not set(names) & set(self.empty):
            raise UserError(
                f"{features.folder / EMPTY_TEXT}: holds none of {', '.join(names)}; "
                "remove it and run the prepare command again"
            )
        self.keys: list[Shape] = []
        for number, sample in enumerate(features.keys):
            shapes = features.shapes(number)
            check(f"{features.folder}: {sample}", shapes)
            self.keys.append(shapes[key])
        self.identity: dict[str, Any] = {"data.path (samples)": len(features), **content(features.folder / INDEX)}

    def read(self, index: int, seed: int) -> Sample:
        """Return a sample's features."""
        tensors = self.features.read(index)
        if self.empty and drops_text(seed, self.text_drop):
            tensors |= self.empty
        return {**{name: tensors[name] for name in self.names}, "seed": seed}


class FeatureFiles:
    """Reads a .jsonl list whose lines name, under ``file``, a file of features that ``load`` reads.

    ``load`` is given files that can be opened, and raises UserError for one that cannot be used. Such files have no
    embedding of the empty text.
    """

    def __init__(
        self,
        path: Path,
        data: PictureData,
        collate: Collate,
        *,
        load: Callable[[Path], dict[str, Tensor]],
        check: Check,
        key: str = "latents",
    ) -> None:
        if data.text_drop:
            raise UserError(
                f"data.text_drop={data.text_drop}: {path} has no embedding of the empty text; set data.text_drop=0, or "
                "encode the videos with the prepare command"
            )
        self.load, self.collate = load, collate
        self.bad = BadFiles(data.on_bad)
        self.files: list[tuple[str, Path]] = []
        self.keys: list[Shape] = []
        facts = content(path)
        files = _listed(path)

        def look(listed: tuple[str, Path]) -> Shape:
            where, file = listed
            with naming(where):
                check_file(file)
                shapes = {name: tuple(tensor.shape) for name, tensor in load(file).items()}
                check(str(file), shapes)
            return shapes[key]

        for listed, found in zip(files, spread(look, files), strict=True):
            if isinstance(found, UserError):
                self.bad.add(found)
            else:
                self.files.append(listed)
                self.keys.append(found)
        self.bad.report(len(files))
        if not self.files:
            raise UserError(f"{path}: none of its {len(files)} files can be used")
        self.identity: dict[str, Any] = {**facts, "data.path (files that can be used)": len(self.files)}

    def read(self, index: int, seed: int) -> Sample | None:
        """Return a file's features, or None if it is bad."""
        where, file = self.files[index]
        try:
            with naming(where):
                check_file(file)
                return {**self.load(file), "seed": seed}
        except UserError as error:
            self.bad.found_late(error)
            return None


class RandomFeatures:
    """Makes random features of given shapes, which follow from the sample's seed alone."""

    keys = ("random",)

    def __init__(self, shapes: Mapping[str, Shape], collate: Collate) -> None:
        self.shapes, self.collate = dict(shapes), collate
        self.identity: dict[str, Any] = {}

    def read(self, index: int, seed: int) -> Sample:
        """Return a sample."""
        # Tensors of one shape are not one tensor.
        made = {name: noise(shape, seed + 997 * place) for place, (name, shape) in enumerate(self.shapes.items())}
        return {**made, "seed": seed}


def read_empty_text(folder: Path) -> dict[str, Tensor]:
    """Return what the empty caption was encoded to; UserError if the folder does not tell."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / EMPTY_TEXT)
    except (OSError, SafetensorError):
        raise UserError(
            f"{folder / EMPTY_TEXT}: missing or damaged; remove it and run the prepare command again"
        ) from None


def write_empty_text(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what the empty caption was encoded to."""
    draft = folder / f".{EMPTY_TEXT}.tmp"
    save_tensors(draft, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    publish(draft, folder / EMPTY_TEXT)


def _listed(path: Path) -> list[tuple[str, Path]]:
    """Return the files that a list names, each after the line that names it."""
    files = []
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if text.strip():
            try:
                files.append((f"{path}:{line}", path.parent / json.loads(text)["file"]))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path}:{line}: not a JSON object with the key 'file'") from None
    return files
