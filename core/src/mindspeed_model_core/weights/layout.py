"""A published layout of weights: one table of rows, each of a pure, invertible op, read in both directions.

A row says which tensors of the layout make one of our parameters. The table is total: a tensor that no row names, or
that a row names and the files lack, is an error.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..recipe import Section
from .tensorfile import Spec, Writer, open_safetensors


class Op(ABC):
    """A pure, invertible rearrangement of one tensor: ``join`` from the layout's form to ours, ``split`` back."""

    @abstractmethod
    def join(self, theirs: Tensor) -> Tensor:
        """Return our form."""

    @abstractmethod
    def split(self, ours: Tensor) -> Tensor:
        """Return the layout's form."""

    def grain(self, dim: int) -> int | None:
        """Return the size of the blocks along ``dim`` that the op keeps in place, or None: it needs the whole tensor.

        A slice made of such blocks may be read and joined alone.
        """
        return None


@dataclass(frozen=True)
class Same(Op):
    """The tensor as it is."""

    def join(self, theirs: Tensor) -> Tensor:
        """Return the tensor."""
        return theirs

    def split(self, ours: Tensor) -> Tensor:
        """Return the tensor."""
        return ours

    def grain(self, dim: int) -> int | None:
        """Every index stays in place."""
        return 1


@dataclass(frozen=True)
class Reshape(Op):
    """The same elements in another shape, such as a convolution's kernel that is a matrix here."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def join(self, theirs: Tensor) -> Tensor:
        """Return the elements in our shape."""
        return theirs.reshape(self.ours)

    def split(self, ours: Tensor) -> Tensor:
        """Return the elements in the layout's shape."""
        return ours.reshape(self.theirs)


@dataclass(frozen=True)
class HeadPermute(Op):
    """Rows of each head: theirs rotates neighbours (2i, 2i+1), ours the two halves (i, i + head_dim / 2).

    The two rotary conventions of Meta's reference and of transformers; heads stay in order.
    """

    head_dim: int

    def join(self, theirs: Tensor) -> Tensor:
        """Return rows of even index, then of odd index, in every head."""
        return theirs.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    def split(self, ours: Tensor) -> Tensor:
        """Return rows interleaved in every head."""
        return ours.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    def grain(self, dim: int) -> int | None:
        """Whole heads stay in place, and so does every column."""
        return self.head_dim if dim == 0 else 1


@dataclass(frozen=True)
class SwapHalves(Op):
    """The second half of the rows before the first, such as a scale and a shift made by one map."""

    def join(self, theirs: Tensor) -> Tensor:
        """Return the halves in the other order."""
        return torch.cat(theirs.chunk(2)[::-1])

    def split(self, ours: Tensor) -> Tensor:
        """Return the halves in the other order."""
        return torch.cat(ours.chunk(2)[::-1])

    def grain(self, dim: int) -> int | None:
        """Every column stays in place."""
        return None if dim == 0 else 1


@dataclass(frozen=True)
class Cat:
    """Our parameter stacks several of theirs along ``dim``, each through its own op.

    ``sizes`` are our parts' sizes along ``dim`` (empty: equal parts); ``ops`` one op each (empty: all the same).
    """

    dim: int = 0
    sizes: tuple[int, ...] = ()
    ops: tuple[Op, ...] = ()


@dataclass(frozen=True)
class Part:
    """One tensor of the layout and the range of our parameter, along the row's dim, that it makes."""

    name: str
    op: Op
    start: int
    size: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Bound:
    """A row applied to one parameter: its name and whole shape, and the parts it is stacked from along ``dim``."""

    name: str
    shape: tuple[int, ...]
    dim: int
    parts: tuple[Part, ...]

    def split(self, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the layout's tensors of our whole parameter."""
        for part in self.parts:
            mine = whole if len(self.parts) == 1 else whole.narrow(self.dim, part.start, part.size)
            yield part.name, part.op.split(mine)


@dataclass(frozen=True)
class Row:
    """``ours`` is made of ``theirs``; ``*`` stands for a number that both sides share."""

    ours: str
    theirs: str | tuple[str, ...]
    op: Op | Cat = Same()

    def bind(self, name: str, numbers: Sequence[str], shape: tuple[int, ...]) -> Bound:
        """Apply the row to one parameter of ours."""
        theirs = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        cat = self.op if isinstance(self.op, Cat) else Cat(ops=(self.op,))
        whole = shape[cat.dim] if shape else 1
        sizes = cat.sizes or (whole // len(theirs),) * len(theirs)
        ops = cat.ops or (Same(),) * len(theirs)
        if not len(sizes) == len(ops) == len(theirs) or sum(sizes) != whole:
            raise ValueError(f"{self.ours}: parts {sizes} with {len(ops)} ops do not make {name}{list(shape)}")
        parts, start = [], 0
        for their, op, size in zip(theirs, ops, sizes, strict=True):
            mine = (*shape[: cat.dim], size, *shape[cat.dim + 1 :]) if shape else ()
            form = op.split(torch.empty(mine, device="meta"))
            parts.append(Part(_fill(their, numbers), op, start, size, tuple(form.shape)))
            start += size
        return Bound(name, shape, cat.dim, tuple(parts))


class Table:
    """The rows of a layout; total: each parameter of ours has one row, each tensor of theirs is used or ignored.

    In ``ignore``, ``**`` stands for any text.
    """

    def __init__(self, *rows: Row, ignore: tuple[str, ...] = ()) -> None:
        self.rows = tuple((_pattern(row.ours), row) for row in rows)
        self._ignore = tuple(_pattern(p) for p in ignore)

    def ignored(self, theirs: str) -> bool:
        """Return whether the layout may hold this tensor and we do without it."""
        return any(p.fullmatch(theirs) for p in self._ignore)

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Bound]:
        """Apply the rows to all of a network's parameters; ValueError unless they match one to one."""
        out, used, taken = {}, set(), dict[str, str]()
        for name, shape in shapes.items():
            hits = [(m.groups(), row) for pattern, row in self.rows if (m := pattern.fullmatch(name))]
            if len(hits) != 1:
                raise ValueError(f"weight table: {len(hits)} rows match the parameter {name!r}, expected one")
            numbers, row = hits[0]
            out[name] = row.bind(name, numbers, shape)
            used.add(row.ours)
            for part in out[name].parts:
                if part.name in taken:
                    raise ValueError(f"weight table: {part.name!r} makes both {taken[part.name]!r} and {name!r}")
                taken[part.name] = name
        idle = [row.ours for _, row in self.rows if row.ours not in used]
        if idle:
            raise ValueError(f"weight table: no parameter matches the row {idle[0]!r}")
        return out


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\*\*", ".+").replace(r"\*", r"(\d+)"))


def _fill(pattern: str, numbers: Sequence[str]) -> str:
    rest = iter(numbers)
    return re.sub(r"\*", lambda _: next(rest), pattern)


class Source(Protocol):
    """Tensors one can read by name, whole or in slices."""

    def names(self) -> list[str]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def where(self, name: str) -> Path: ...
    def slot(self, name: str) -> Any: ...
    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor: ...


class Files(Protocol):
    """How a layout keeps tensors in a folder; ``patterns`` are the paths that files of tensors may have in it."""

    @property
    def patterns(self) -> tuple[str, ...]: ...
    def open(self, folder: Path) -> Source: ...
    def create(self, folder: Path, specs: Mapping[str, Spec], *, shards: int, shard_bytes: int) -> Writer: ...


def first_stranger(folder: Path, patterns: Sequence[str]) -> Path | None:
    """Return something below ``folder`` whose path matches none of the patterns (``*`` stays in one part), or None."""
    wanted = [PurePath(pattern) for pattern in patterns]
    inner = {parent for pattern in wanted for parent in pattern.parents}
    for path in sorted(folder.rglob("*")):
        here = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            if here not in inner:
                return here
        elif not any(len(here.parts) == len(w.parts) and here.match(str(w)) for w in wanted):
            return here
    return None


def _one(config: Any, shards: int | None) -> int:
    if shards is not None:
        raise UserError(f"shards={shards}: this layout cuts its files by size, leave shards out")
    return 1


ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdapterFormat:
    """A published form of low-rank adapters: its file, and what precedes a module's name in its keys.

    Rank and scale are in adapter_config.json, or with ``in_file`` in the metadata of the file itself.
    """

    name: str
    file: str
    prefix: str
    in_file: bool = False

    def detect(self, folder: Path) -> bool:
        """Whether a folder holds adapters in this form."""
        return (folder / self.file).is_file()

    def check(self, folder: Path) -> None:
        """Raise UserError unless the file of adapters can be read."""
        open_safetensors(folder / self.file)

    @property
    def holds(self) -> tuple[str, ...]:
        """What a folder in this form may hold, as patterns of paths."""
        return (self.file,) if self.in_file else (self.file, ADAPTER_CONFIG)


PEFT = AdapterFormat("peft", "adapter_model.safetensors", "base_model.model.")
DIFFUSERS = AdapterFormat("diffusers", "pytorch_lora_weights.safetensors", "transformer.", in_file=True)
FORMATS = (PEFT, DIFFUSERS)


@dataclass(frozen=True)
class Layout:
    """A published form of a model: file names, tensor names, and where its configuration is written.

    ``build`` makes the network and ``table`` the weight table of a configuration. ``silent`` are configuration fields
    the layout cannot carry: they come from the preset that agrees on all others. ``loose`` are fields that leave the
    weights' meaning alone, so a folder may differ in them from the network it is loaded into. ``extra`` makes tensors
    the layout has beside ours; ``extras`` names files and ``parts`` folders copied along from where the weights came
    from. ``companions(config, origin)`` plans, before anything is written, what must be translated on the way, and
    returns what writes it into a folder, or None: nothing. ``complete`` writes what describes them all;
    ``config_file`` is where the configuration is; where that is in the files of tensors, ``files_for(config)`` makes
    files that say it; ``shards`` gives the number of files; ``adapter`` is the form
    adapters of the layout's modules are published in, if there is one.
    """

    name: str
    build: Callable[[Any], nn.Module]
    table: Callable[[Any], Table]
    detect: Callable[[Path], bool]
    read_config: Callable[[Path], Section]
    write_config: Callable[[Any, Path, torch.dtype], None]
    files: Files
    describe: str = ""
    silent: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    extra: Callable[[Any, torch.dtype], Mapping[str, Tensor]] = lambda config, dtype: {}
    extras: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    companions: Callable[[Any, Path], Callable[[Path], None] | None] = lambda config, origin: None
    complete: Callable[[Any, Path], None] = lambda config, folder: None
    config_file: str = "config.json"
    files_for: Callable[[Any], Files] | None = None
    shards: Callable[[Any, int | None], int] = _one
    adapter: AdapterFormat | None = None

    @property
    def holds(self) -> tuple[str, ...]:
        """What a folder in this layout may hold, as patterns of paths: all that we would write into one."""
        return (self.config_file, *self.files.patterns, *self.extras, *(f"{part}/*" for part in self.parts))

    def check(self, folder: Path) -> None:
        """Raise UserError unless the folder's configuration is this model's and its files of tensors can be read."""
        self.read_config(folder)
        self.files.open(folder)
