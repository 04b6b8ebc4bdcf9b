"""Weights between this project's names and published layouts: one table per layout, read in both directions.

A table row says which tensors of the layout make one of our parameters and by which pure, invertible op. Training
reads its slices straight from a published folder (``load``), a trained network goes back into one (``save``), and
``convert`` turns any source into any layout. All three stream: memory stays at about one tensor per thread.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from . import recipe as recipes
from .errors import UserError, nearest
from .parallel.placement import Placement, placements
from .recipe import Section
from .tensorfile import Spec, Writer

if TYPE_CHECKING:
    from .model import Model

_WORKERS = 2

# ------------------------------------------------------------------------------------------------ ops


class Op:
    """A pure, invertible rearrangement of one tensor: ``join`` from the layout's form to ours, ``split`` back."""

    def join(self, theirs: Tensor) -> Tensor:
        """Return our form."""
        raise NotImplementedError

    def split(self, ours: Tensor) -> Tensor:
        """Return the layout's form."""
        raise NotImplementedError

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
class Cat:
    """Our parameter stacks several of theirs along ``dim``, each through its own op.

    ``sizes`` are our parts' sizes along ``dim`` (empty: equal parts); ``ops`` one op each (empty: all the same).
    """

    dim: int = 0
    sizes: tuple[int, ...] = ()
    ops: tuple[Op, ...] = ()


# ------------------------------------------------------------------------------------------------ table


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
    """The rows of a layout; total: each parameter of ours has one row, each tensor of theirs is used or ignored."""

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
    return re.compile(re.escape(text).replace(r"\*", r"(\d+)"))


def _fill(pattern: str, numbers: Sequence[str]) -> str:
    rest = iter(numbers)
    return re.sub(r"\*", lambda _: next(rest), pattern)


# ------------------------------------------------------------------------------------------------ layouts


class Source(Protocol):
    """Tensors one can read by name, whole or in slices."""

    def names(self) -> list[str]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def where(self, name: str) -> Path: ...
    def slot(self, name: str) -> Any: ...
    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor: ...


class Files(Protocol):
    """How a layout keeps tensors in a folder."""

    def open(self, folder: Path) -> Source: ...
    def create(self, folder: Path, specs: Mapping[str, Spec], *, shards: int, shard_bytes: int) -> Writer: ...


def _one(config: Any, shards: int | None) -> int:
    if shards is not None:
        raise UserError(f"shards={shards}: this layout cuts its files by size, leave shards out")
    return 1


@dataclass(frozen=True)
class Layout:
    """A published form of a model: file names, tensor names, and where its configuration is written.

    ``build`` makes the network and ``table`` the weight table of a configuration. ``silent`` are configuration fields
    the layout cannot carry: they come from the preset that agrees on all others. ``loose`` are fields that leave the
    weights' meaning alone, so a folder may differ in them from the network it is loaded into. ``extra`` makes tensors
    the layout has beside ours; ``extras`` names files copied along from the source; ``shards`` gives the number of
    files.
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
    shards: Callable[[Any, int | None], int] = _one


@dataclass(frozen=True)
class Opened:
    """A source of weights: its configuration, its table, its tensors, and where its tokenizer files are."""

    path: Path
    config: Any
    table: Table
    tensors: Source
    layout: Layout | None = None
    extras: str | Path | None = None


def find_layout(model: Model, name: str) -> Layout:
    """Return a model's layout by name; UserError names the known ones."""
    for layout in model.layouts:
        if layout.name == name:
            return layout
    raise UserError(f"layout={name!r}: {model.name} has no such layout{nearest(name, [x.name for x in model.layouts])}")


def open_source(source: str | Path, model: Model, *, preset: str | None = None) -> Opened:
    """Detect what a folder is (a run's checkpoint or one of the model's layouts) and open it, reading no weights.

    With ``preset``, the folder must be of that size. UserError names the file, key or field that is wrong.
    """
    from .checkpoint import is_checkpoint, open_weights

    path = Path(source)
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such folder; a model on the hub must be downloaded first"
        raise UserError(f"{path}: {what}")
    wanted = model.preset(preset) if preset else None
    if is_checkpoint(path):
        run = _Run(path, open_weights(path))
        if run.model not in (None, model.name):
            raise UserError(f"{path}: is a checkpoint of {run.model}, not of {model.name}")
        kind = type(next(iter(model.presets.values())))
        config: Any = recipes.validate(kind, run.config, f"{path}: config")  # type: ignore[type-var]
        opened = Opened(
            path, config, Table(*(Row(name, name) for name in whole(model.build, config)[0])), run, None, run.tokenizer
        )
        loose: tuple[str, ...] = ()
    else:
        layout = next((x for x in model.layouts if x.detect(path)), None)
        if layout is None:
            known = ", ".join(f"{x.name} ({x.describe})" if x.describe else x.name for x in model.layouts)
            held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise UserError(
                f"{path}: no weights of {model.name} here; known: {known}, a run's checkpoint; found: {held}"
            )
        config = _complete(layout.read_config(path), layout, model, wanted)
        opened = Opened(path, config, layout.table(config), layout.files.open(path), layout, path)
        loose = (*layout.loose, *layout.silent)
    if wanted is not None:
        _agree(path, config, wanted, f"preset {preset!r}", model, loose)
    return opened


def read_config(source: str | Path, model: Model) -> Any:
    """Return the configuration of the network a folder holds."""
    return open_source(source, model).config


def _complete(config: Any, layout: Layout, model: Model, wanted: Section | None) -> Any:
    """Fill what the layout cannot carry from the wanted preset, or the one that agrees in all it can."""
    if not layout.silent:
        return config
    said = config.model_dump(exclude=set(layout.silent))
    for preset in [wanted] if wanted is not None else model.presets.values():
        if preset.model_dump(exclude=set(layout.silent)) == said:
            return preset
    return config


def _agree(path: Path, config: Any, wanted: Any, whose: str, model: Model, loose: tuple[str, ...]) -> None:
    """Raise unless two configurations are equal but for ``loose`` fields, naming the first that differs."""
    got, want = config.model_dump(exclude=set(loose)), wanted.model_dump(exclude=set(loose))
    for key in want:
        if got[key] != want[key]:
            close = max(
                model.presets, key=lambda name: sum(getattr(model.presets[name], k) == v for k, v in got.items())
            )
            exact = model.presets[close].model_dump(exclude=set(loose)) == got
            hint = f"the folder holds preset {close!r}" if exact else f"the nearest preset is {close!r}"
            raise UserError(f"{path}: {key}={got[key]!r} here, but {whose} has {key}={want[key]!r}; {hint}")


class _Run:
    """A run's checkpoint as a Source under our own names."""

    def __init__(self, path: Path, opened: Any) -> None:
        self.path, self.opened = path, opened
        self.config: dict[str, Any] = dict(opened.config)
        info = getattr(opened, "info", {})
        self.model, recipe = info.get("model"), info.get("recipe") or {}
        self.tokenizer = (recipe.get("data") or {}).get("tokenizer") or recipe.get("init_from")

    def names(self) -> list[str]:
        return list(self.opened.names())

    def dtype(self, name: str) -> torch.dtype:
        return self.opened.dtype(name) if hasattr(self.opened, "dtype") else self.opened.read(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.opened.shape(name))

    def where(self, name: str) -> Path:
        return self.path

    def slot(self, name: str) -> None:
        return None

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        whole = self.opened.read(name)
        return whole if length is None else whole.narrow(dim, start, length)


def whole(build: Callable[[Any], nn.Module], config: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, Placement]]:
    """Return the shape and placement of every parameter of the uncut network, built without memory."""
    with torch.device("meta"):
        net = build(config)
    return {name: tuple(p.shape) for name, p in net.named_parameters()}, dict(placements(net))


def check(opened: Opened, bounds: Mapping[str, Bound]) -> None:
    """Raise UserError unless the source has every tensor the table asks for, in its shape, and no other."""
    tensors = opened.tensors
    have = set(tensors.names())
    need = {part.name: (part, bound) for bound in bounds.values() for part in bound.parts}
    unknown = sorted(name for name in have - need.keys() if not opened.table.ignored(name))
    missing = [name for name in need if name not in have]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        hint = nearest(missing[0], unknown) if unknown else ""
        raise UserError(f"{opened.path}: missing key {missing[0]!r}{more}{hint}")
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise UserError(f"{tensors.where(unknown[0])}: unknown key {unknown[0]!r}{more}{nearest(unknown[0], need)}")
    for name, (part, _) in need.items():
        if tensors.shape(name) != part.shape:
            raise UserError(
                f"{tensors.where(name)}: {name}: has shape {list(tensors.shape(name))}, "
                f"the configuration asks for {list(part.shape)}"
            )


# ------------------------------------------------------------------------------------------------ load


def load(
    net: nn.Module,
    source: str | Path,
    model: Model,
    *,
    tp_rank: int = 0,
    tp: int = 1,
    write: Callable[[str, Tensor], None] | None = None,
) -> None:
    """Read a network's parameters from a hub folder, an original release or a run's checkpoint.

    Only names that ``net`` has are read (it may be one pipeline stage), and of each only rank ``tp_rank``'s slice of
    ``tp``. Each is copied into its parameter, or given to ``write(name, tensor)`` on the CPU in the folder's dtype, so
    that a master of more precision than its parameter loses nothing. UserError names the file and key, or the field
    in which folder and network disagree.
    """
    opened = open_source(source, model)
    loose = (*opened.layout.loose, *opened.layout.silent) if opened.layout else ()
    _agree(opened.path, opened.config, net.config, "this network", model, loose)
    shapes, where = whole(model.build, net.config)
    bounds = opened.table.bind(shapes)
    check(opened, bounds)
    targets = dict(net.named_parameters())

    def fetch(name: str) -> Tensor:
        place = where[name]
        cut = tp > 1 and place.dim is not None
        pieces = place.pieces(shapes[name][place.dim], tp_rank, tp) if cut and place.dim is not None else None
        kind = targets[name].dtype if write is None else None
        return read(opened.tensors, bounds[name], place.dim if cut else None, pieces, kind)

    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        ahead: list[tuple[str, Future[Tensor]]] = []
        names = iter(targets)
        try:
            while True:
                # One tensor is read while the one before it is taken.
                for name in names:
                    ahead.append((name, pool.submit(fetch, name)))
                    if len(ahead) == 2:
                        break
                if not ahead:
                    break
                name, future = ahead.pop(0)
                tensor = future.result()
                if write is not None:
                    write(name, tensor)
                    continue
                if targets[name].shape != tensor.shape:
                    held, got = list(targets[name].shape), list(tensor.shape)
                    raise ValueError(f"{name}: the network holds {held}, rank {tp_rank} of {tp} reads {got}")
                targets[name].copy_(tensor)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read(
    tensors: Source,
    bound: Bound,
    dim: int | None = None,
    pieces: Sequence[tuple[int, int]] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return our parameter from its parts: whole, or the (start, length) pieces of it along ``dim`` in their order."""
    if dim is None or pieces is None:
        parts = [p.op.join(tensors.read(p.name)).to(dtype or tensors.dtype(p.name)) for p in bound.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, bound.dim)

    def part_piece(part: Part, start: int, length: int) -> Tensor:
        out = _slice(tensors, part, dim, start, length)
        return out.to(dtype or out.dtype)

    if dim != bound.dim:
        rows = [[part_piece(part, start, length) for start, length in pieces] for part in bound.parts]
        return torch.cat([torch.cat(row, dim) for row in rows], bound.dim) if len(rows) > 1 else torch.cat(rows[0], dim)
    out = []
    for start, length in pieces:
        for part in bound.parts:
            low, high = max(start, part.start), min(start + length, part.start + part.size)
            if low < high:
                out.append(part_piece(part, low - part.start, high - low))
    return out[0] if len(out) == 1 else torch.cat(out, dim)


def _slice(tensors: Source, part: Part, dim: int, start: int, length: int) -> Tensor:
    """Return ``length`` indices from ``start`` along ``dim`` of one part in our form."""
    grain = part.op.grain(dim)
    if grain and start % grain == 0 and length % grain == 0:
        return part.op.join(tensors.read(part.name, dim, start, length))
    return part.op.join(tensors.read(part.name)).narrow(dim, start, length)


# ------------------------------------------------------------------------------------------------ save and convert


def save(
    tensors: Iterable[tuple[str, Tensor]] | Callable[[], Iterable[tuple[str, Tensor]]],
    config: Any,
    layout: Layout,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    shards: int | None = None,
    shard_bytes: int = 5_000_000_000,
    extras_from: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a network as a published layout from its (name, whole tensor) pairs, taken one at a time in any order.

    ``dtype`` is what is written (default: the first tensor's, and then all must have it). The folder appears whole or
    not at all. Only one process may call this; the others must drain their side of the iterable.
    """
    shapes, _ = whole(layout.build, config)
    bounds = layout.table(config).bind(shapes)
    count = layout.shards(config, shards)
    pairs = iter(tensors() if callable(tensors) else tensors)
    with _folder(Path(destination), overwrite, (layout,)) as folder:
        writer: Writer | None = None
        left = set(bounds)
        try:
            for name, tensor in pairs:
                if name not in left:
                    raise ValueError(f"{name}: not a parameter of the network, or given twice{nearest(name, left)}")
                if tuple(tensor.shape) != shapes[name]:
                    raise ValueError(f"{name}: has shape {list(tensor.shape)}, the whole one is {list(shapes[name])}")
                kind = dtype or tensor.dtype
                if writer is None:
                    first = kind
                    specs = {p.name: Spec(kind, p.shape) for bound in bounds.values() for p in bound.parts}
                    extra = layout.extra(config, kind)
                    writer = _create(folder, layout, specs, extra, count, shard_bytes)
                if kind != first:
                    raise ValueError(f"{name}: is {kind}, those before it {first}; say which with dtype=")
                for theirs, part in bounds[name].split(tensor.detach().to("cpu", kind)):
                    writer.write(theirs, part)
                left.discard(name)
                del tensor
            if writer is None or left:
                raise ValueError(f"{len(left)} parameters were not given, first {min(left)!r}")
            writer.finish()
        finally:
            if writer is not None:
                writer.close()
        layout.write_config(config, folder, first)
        _copy_extras(extras_from, layout, folder)


def convert(
    source: str | Path,
    destination: str | Path,
    model: Model,
    layout: Layout | str,
    *,
    preset: str | None = None,
    dtype: torch.dtype | None = None,
    shards: int | None = None,
    shard_bytes: int = 5_000_000_000,
    extras_from: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Turn a hub folder, an original release or a run's checkpoint into one of the model's layouts.

    Weights keep their bits unless ``dtype`` asks for another type. Tensors that both layouts hold alike are copied as
    bytes; our own (fused) form is made only where the two cut a parameter differently. ``progress(done, total)``
    counts bytes. The folder appears whole or not at all; UserError names the file, key or field that is wrong.
    """
    layout = find_layout(model, layout) if isinstance(layout, str) else layout
    opened = open_source(source, model, preset=preset)
    shapes, _ = whole(model.build, opened.config)
    bounds, goals = opened.table.bind(shapes), layout.table(opened.config).bind(shapes)
    check(opened, bounds)
    tensors = opened.tensors
    jobs: list[_Job] = []
    specs: dict[str, Spec] = {}
    for name, goal in goals.items():
        bound = bounds[name]
        alike = bound.dim == goal.dim and [p.size for p in bound.parts] == [p.size for p in goal.parts]
        for theirs, part in zip(bound.parts if alike else bound.parts[:1] * len(goal.parts), goal.parts, strict=True):
            specs[part.name] = Spec(dtype or tensors.dtype(theirs.name), part.shape)
            if alike:
                jobs.append(_Job(specs[part.name].nbytes, [part.name], theirs, part))
        if not alike:
            names = [part.name for part in goal.parts]
            jobs.append(_Job(sum(specs[n].nbytes for n in names), names, bound, goal))
    common = max(specs.values(), key=lambda spec: spec.nbytes).dtype
    count = layout.shards(opened.config, shards)
    extra = layout.extra(opened.config, common)
    total, done = sum(job.nbytes for job in jobs), 0
    with _folder(Path(destination), overwrite, model.layouts, source=opened.path) as folder:
        writer = _create(folder, layout, specs, extra, count, shard_bytes)
        # A checkpoint's reader is not ours to call from several threads.
        pool = ThreadPoolExecutor(_WORKERS if opened.layout else 1)
        try:
            futures = {pool.submit(job.run, tensors, writer, specs): job.nbytes for job in jobs}
            for future in as_completed(futures):
                future.result()
                done += futures[future]
                if progress:
                    progress(done, total)
            writer.finish()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            writer.close()
        layout.write_config(opened.config, folder, common)
        _copy_extras(extras_from or opened.extras, layout, folder)


@dataclass(frozen=True)
class _Job:
    """The way of one tensor, or of one parameter that the two layouts cut differently."""

    nbytes: int
    names: list[str]
    here: Part | Bound
    there: Part | Bound

    def run(self, tensors: Source, writer: Writer, specs: Mapping[str, Spec]) -> None:
        here, there = self.here, self.there
        if isinstance(here, Bound) and isinstance(there, Bound):
            for name, part in there.split(read(tensors, here)):
                writer.write(name, part.to(specs[name].dtype))
        elif isinstance(here, Part) and isinstance(there, Part):
            same = here.op == there.op
            spec, slot = specs[there.name], tensors.slot(here.name)
            if same and slot is not None and writer.slot(there.name) and slot.spec == spec:
                writer.copy(there.name, slot)
                return
            tensor = tensors.read(here.name)
            tensor = tensor if same else there.op.split(here.op.join(tensor))
            writer.write(there.name, tensor.to(spec.dtype))


def _create(
    folder: Path, layout: Layout, specs: Mapping[str, Spec], extra: Mapping[str, Tensor], shards: int, shard_bytes: int
) -> Writer:
    """Lay out the files, after seeing that the disk has room, and write the layout's extra tensors."""
    everything = {**specs, **{name: Spec(t.dtype, tuple(t.shape)) for name, t in extra.items()}}
    need, free = sum(spec.nbytes for spec in everything.values()), shutil.disk_usage(folder).free
    if need > free:
        raise OSError(errno.ENOSPC, f"{need / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free")
    writer = layout.files.create(folder, everything, shards=shards, shard_bytes=shard_bytes)
    for name, tensor in extra.items():
        writer.write(name, tensor)
    return writer


def _copy_extras(origin: str | Path | None, layout: Layout, folder: Path) -> None:
    if origin is None:
        return
    origin = Path(origin).parent if Path(origin).is_file() else Path(origin)
    for name in layout.extras:
        if (origin / name).is_file() and not (folder / name).exists():
            shutil.copyfile(origin / name, folder / name)


@contextmanager
def _folder(
    destination: Path, overwrite: bool, layouts: tuple[Layout, ...], source: Path | None = None
) -> Iterator[Path]:
    """Give a temporary folder that becomes ``destination`` if all goes well and is removed if not."""
    target = Path(os.path.realpath(destination))
    if source is not None:
        origin = Path(os.path.realpath(source))
        if target == origin or target in origin.parents:
            raise UserError(f"{destination}: is the source {source}, or holds it; choose another destination")
    _vacant(destination, target, overwrite, layouts)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        if overwrite and target.exists():
            os.rename(target, aside)
            try:
                os.rename(temporary, target)
            except OSError:
                os.rename(aside, target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            _vacant(destination, target, overwrite, layouts)
            os.rename(temporary, target)
        _sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            detail = f" ({error.strerror})" if "needed" in str(error.strerror) else ""
            raise UserError(f"{destination}: no space left on the device{detail}; nothing was kept") from None
        raise UserError(f"{destination}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _vacant(destination: Path, target: Path, overwrite: bool, layouts: tuple[Layout, ...]) -> None:
    """Raise UserError if something is at the destination that may not be replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UserError(f"{destination}: is a file; the destination must be a folder")
    if any(target.iterdir()):
        if not overwrite:
            raise UserError(f"{destination}: exists; choose another destination, or overwrite it with --overwrite")
        if not any(layout.detect(target) for layout in layouts):
            names = " or ".join(layout.name for layout in layouts)
            raise UserError(
                f"{destination}: holds no weights in layout {names}, so it is not overwritten; remove it first"
            )


def _sync(path: Path) -> None:
    with suppress(OSError):  # some network file systems cannot sync a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
