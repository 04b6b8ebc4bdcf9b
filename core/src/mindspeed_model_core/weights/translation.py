"""The frozen parts beside a network (VAE, text and image encoders), from one published layout into another.

Each has a ``Layout`` for either form, under the parameter names of its diffusers or transformers class; that class,
built without memory, says which tensors there must be. A model gives the tables.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import UserError
from ..files import check_fixed, read_json, write_json
from ..recipe import Section, validate
from .layout import Bound, Files, Layout, Source, Table
from .pth import TorchFile
from .source import Opened, check, read, whole
from .tensorfile import Spec

SHARD_BYTES = 5_000_000_000
"""The largest file a part is written in."""

Progress = Callable[[int, int], None]


class PartConfig(Section):
    """What varies between the sizes of a frozen part, under the hub's field names."""

    whose: ClassVar[str] = ""
    """The model, as errors call it."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """The settings all its sizes share, which the other layout cannot say: what the class must be built with."""

    def settings(self) -> dict[str, Any]:
        """Return all that the class is built with."""
        return {**self.model_dump(mode="json"), **self.fixed}


class Sizes:
    """The sizes of the tensors at ``path``, from which a configuration follows where the layout states none."""

    def __init__(self, path: Path, tensors: Source) -> None:
        self.path, self._tensors = path, tensors
        self._names = set(tensors.names())

    def __call__(self, name: str, dim: int) -> int:
        """Return a tensor's size along ``dim``; UserError if it is missing."""
        self.need(name)
        shape = self._tensors.shape(name)
        if dim >= len(shape):
            raise UserError(f"{self.path}: {name}: has shape {list(shape)}, expected at least {dim + 1} dims")
        return shape[dim]

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def need(self, name: str) -> None:
        """Raise UserError if a tensor is missing."""
        if name not in self._names:
            raise UserError(f"{self.path}: missing key {name!r}")

    def count(self, stem: str) -> int:
        """Return how many modules of a list there are, the highest number among them plus one."""
        numbers = re.compile(re.escape(stem) + r"\.(\d+)\.")
        return 1 + max((int(m[1]) for name in self._names if (m := numbers.match(name))), default=-1)


# ------------------------------------------------------------------------------------------------ layouts


def hub_part(
    kind: type[PartConfig],
    build: Callable[[Any], nn.Module],
    table: Callable[[Any], Table],
    files: Files,
    name: str,
    says: Callable[[Any], Mapping[str, Any]],
    *,
    typed: bool,
) -> Layout:
    """Return the layout of a part in its folder ``name`` of a diffusers pipeline.

    config.json holds the part's settings and what it ``says`` beside; with ``typed`` the type of the weights as well,
    as transformers writes it. A folder whose settings are not the ``fixed`` ones is refused.
    """

    def read_config(folder: Path) -> PartConfig:
        path = folder / name / "config.json"
        raw = read_json(path)
        check_fixed(raw, kind.fixed, path, kind.whose)
        return validate(kind, {key: raw[key] for key in kind.model_fields if key in raw}, str(path))

    def write_config(config: Any, folder: Path, dtype: torch.dtype) -> None:
        short = str(dtype).removeprefix("torch.")
        types = {"torch_dtype": short, "dtype": short} if typed else {}  # as transformers 4 and 5 call it
        write_json(folder / name / "config.json", {**says(config), **config.settings(), **types})

    return Layout(
        name=name,
        build=build,
        table=table,
        detect=lambda folder: (folder / name).is_dir(),
        read_config=read_config,
        write_config=write_config,
        files=files,
        config_file=f"{name}/config.json",
    )


def file_part(
    build: Callable[[Any], nn.Module],
    table: Callable[[Any], Table],
    files: TorchFile,
    read_config: Callable[[Path], PartConfig],
) -> Layout:
    """Return the layout of a part that is one file of ``torch.save`` and states no configuration."""
    return Layout(
        name=files.name,
        build=build,
        table=table,
        detect=lambda folder: (folder / files.name).is_file(),
        read_config=read_config,
        write_config=lambda config, folder, dtype: None,
        files=files,
        config_file=files.name,
    )


def parameters(build: Callable[[Any], nn.Module], config: Any) -> list[str]:
    """Return the names of a part's parameters."""
    return list(whole(build, config)[0])


# ------------------------------------------------------------------------------------------------ from one to another


@dataclass(frozen=True)
class Plan:
    """Frozen parts that were found whole, and folders that go with them, ready to be written elsewhere."""

    moves: tuple[_Move, ...]
    folders: tuple[tuple[Path, str], ...]

    def __call__(self, destination: Path, progress: Progress | None = None) -> None:
        """Write all into a folder; types and bits stay, memory is about one tensor.

        ``progress(done, total)`` counts bytes. UserError, before anything is written, if one is there already; what a
        later failure leaves is the caller's to remove.
        """
        for name in (*(move.layout.name for move in self.moves), *(name for _, name in self.folders)):
            if os.path.lexists(destination / name):
                raise UserError(f"{destination / name}: exists; choose another destination")
        total, done = sum(move.nbytes for move in self.moves), 0
        for move in self.moves:
            for nbytes in move.run(destination):
                done += nbytes
                if progress:
                    progress(done, total)
        for origin, name in self.folders:
            (destination / name).mkdir(parents=True)
            for file in sorted(origin.iterdir()):
                if file.is_file() and not file.name.startswith("."):
                    shutil.copyfile(file, destination / name / file.name)


def plan(source: Path, pairs: Sequence[tuple[Layout, Layout]], folders: Mapping[str, str]) -> Plan:
    """Check that every part is there in its first layout and whole, reading no weights.

    ``folders`` are copied under their other names: what holds no weights, as tokenizers. UserError names a file, folder
    or key that is missing or wrong.
    """
    held = {here.name: here.detect(source) for here, _ in pairs} | {name: (source / name).is_dir() for name in folders}
    for name, there_is in held.items():
        if not there_is:
            raise UserError(f"{source / name}: missing; the parts beside a network come along whole or not at all")
    moves = tuple(_plan(source, *pair) for pair in pairs)
    return Plan(moves, tuple((source / here, there) for here, there in folders.items()))


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
        writer = self.layout.files.create(folder, self.specs, shards=1, shard_bytes=SHARD_BYTES)
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
