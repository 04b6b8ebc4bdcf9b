"""Writes weights in a published layout: a network's (``save``), or those of any source (``convert``), streamed."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError, nearest
from . import adapters
from .folder import new_folder
from .layout import Bound, Layout, Part, Source
from .source import cast, check, find_layout, open_source, read, whole
from .tensorfile import Spec, Writer

if TYPE_CHECKING:
    from ..model import Model

_WORKERS = 2


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
    extras = list(_find_extras([extras_from], layout, config))
    with new_folder(Path(destination), overwrite, (layout,)) as folder:
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
                    writer = _create(folder, layout, config, specs, extra, count, shard_bytes)
                if kind != first:
                    raise ValueError(f"{name}: is {kind}, those before it {first}; say which with dtype=")
                for theirs, part in bounds[name].split(cast(tensor.detach().cpu(), kind, name)):
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
        for write in extras:
            write(folder)
        layout.complete(config, folder)


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
    merge_lora: str | Path | None = None,
    ema: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Turn a hub folder, an original release or a run's checkpoint into one of the model's layouts.

    Weights keep their bits unless ``dtype`` asks for another type. Tensors that both layouts hold alike are copied as
    bytes; our own (fused) form is made only where the two cut a parameter differently. ``progress(done, total)``
    counts bytes. The folder appears whole or not at all; UserError names the file, key or field that is wrong.

    What goes with the weights (tokenizer, encoders) comes along from beside them, or from ``extras_from``. A run of
    adapters becomes a folder of adapters. ``merge_lora`` names adapters to add to the weights. ``ema`` takes
    the moving average of the run that is the source, or of the adapters that are merged.
    """
    from ..data.tokenizer import find_tokenizer

    layout = find_layout(model, layout) if isinstance(layout, str) else layout
    if merge_lora is None and adapters.is_run(source):
        adapters.convert(source, destination, model, layout, dtype=dtype, ema=ema, overwrite=overwrite)
        return
    opened = open_source(source, model, preset=preset, ema=ema and merge_lora is None)
    merged = None if merge_lora is None else adapters.open_adapters(merge_lora, model, opened.config, ema=ema)
    shapes, _ = whole(model.build, opened.config)
    bounds, goals = opened.table.bind(shapes), layout.table(opened.config).bind(shapes)
    check(opened, bounds)
    tensors = opened.tensors
    jobs: list[_Job] = []
    specs: dict[str, Spec] = {}
    for name, goal in goals.items():
        bound = bounds[name]
        change = merged if merged is not None and name.removesuffix(".weight") in merged.pairs else None
        alike = bound.dim == goal.dim and [p.size for p in bound.parts] == [p.size for p in goal.parts]
        alike = alike and change is None
        for theirs, part in zip(bound.parts if alike else bound.parts[:1] * len(goal.parts), goal.parts, strict=True):
            specs[part.name] = Spec(dtype or tensors.dtype(theirs.name), part.shape)
            if alike:
                jobs.append(_Job(specs[part.name].nbytes, [part.name], theirs, part))
        if not alike:
            names = [part.name for part in goal.parts]
            jobs.append(_Job(sum(specs[n].nbytes for n in names), names, bound, goal, change))
    places = [opened.path, find_tokenizer(opened.path), *opened.origins] if extras_from is None else [extras_from]
    extras = list(_find_extras(places, layout, opened.config))
    common = max(specs.values(), key=lambda spec: spec.nbytes).dtype
    count = layout.shards(opened.config, shards)
    extra = layout.extra(opened.config, common)
    total, done = sum(job.nbytes for job in jobs), 0
    with new_folder(Path(destination), overwrite, model.layouts, source=opened.path) as folder:
        writer = _create(folder, layout, opened.config, specs, extra, count, shard_bytes)
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
        for write in extras:
            write(folder)
        layout.complete(opened.config, folder)


@dataclass(frozen=True)
class _Job:
    """The way of one tensor, or of one parameter that the two layouts cut differently."""

    nbytes: int
    names: list[str]
    here: Part | Bound
    there: Part | Bound
    adapters: adapters.Adapters | None = None

    def run(self, tensors: Source, writer: Writer, specs: Mapping[str, Spec]) -> None:
        here, there = self.here, self.there
        if isinstance(here, Bound) and isinstance(there, Bound):
            ours = read(tensors, here)
            if self.adapters is not None:
                ours = self.adapters.add(here.name.removesuffix(".weight"), ours)
            for name, part in there.split(ours):
                writer.write(name, cast(part, specs[name].dtype, name))
        elif isinstance(here, Part) and isinstance(there, Part):
            same = here.op == there.op
            spec, slot = specs[there.name], tensors.slot(here.name)
            if same and slot is not None and writer.slot(there.name) and slot.spec == spec:
                writer.copy(there.name, slot)
                return
            tensor = tensors.read(here.name)
            tensor = tensor if same else there.op.split(here.op.join(tensor))
            writer.write(there.name, cast(tensor, spec.dtype, there.name))


def _create(
    folder: Path,
    layout: Layout,
    config: Any,
    specs: Mapping[str, Spec],
    extra: Mapping[str, Tensor],
    shards: int,
    shard_bytes: int,
) -> Writer:
    """Lay out the files, after seeing that the disk has room, and write the layout's extra tensors."""
    everything = {**specs, **{name: Spec(t.dtype, tuple(t.shape)) for name, t in extra.items()}}
    need, free = sum(spec.nbytes for spec in everything.values()), shutil.disk_usage(folder).free
    if need > free:
        raise OSError(errno.ENOSPC, f"{need / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free")
    files = layout.files if layout.files_for is None else layout.files_for(config)
    writer = files.create(folder, everything, shards=shards, shard_bytes=shard_bytes)
    for name, tensor in extra.items():
        writer.write(name, tensor)
    return writer


def _find_extras(places: Iterable[str | Path | None], layout: Layout, config: Any) -> Iterator[Callable[[Path], None]]:
    """Yield what writes into a folder all that goes with weights and is in these places, the first ones first.

    Where a place holds none of it as the layout has it, but in another layout, it is translated. UserError if that
    cannot be done.
    """
    found = False
    for place in places:
        if place is None:
            continue
        origin = Path(place).expanduser()
        origin = origin.parent if origin.is_file() else origin
        yield partial(_copy_extras, origin, layout)
        found = found or any((origin / name).exists() for name in (*layout.extras, *layout.parts))
        if found:
            continue
        try:
            step = layout.companions(config, origin)
        except UserError as error:
            hint = "--extras-from names another folder that has them, or an empty one to go without"
            raise UserError(f"{error}; {hint}") from None
        if step is not None:
            found = True
            yield step


def _copy_extras(origin: Path, layout: Layout, folder: Path) -> None:
    for name in layout.extras:
        if (origin / name).is_file() and not (folder / name).exists():
            shutil.copyfile(origin / name, folder / name)
    for part in layout.parts:
        if (origin / part).is_dir() and not (folder / part).exists():
            shutil.copytree(origin / part, folder / part)
