"""Reads weights of a published folder or a run, whole or a rank's part of each: memory stays at about a tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .. import lora
from .. import recipe as recipes
from ..checkpoint import is_checkpoint, open_weights
from ..errors import UserError, nearest
from ..parallel.placement import Placement, placements
from ..recipe import Section
from .layout import FORMATS, Bound, Layout, Part, Row, Source, Table

if TYPE_CHECKING:
    from ..model import Model

N = TypeVar("N", bound=nn.Module)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Opened:
    """A source of weights: its configuration, table and tensors; for a run, the folders it had its parts from."""

    path: Path
    config: Any
    table: Table
    tensors: Source
    layout: Layout | None = None
    origins: tuple[str, ...] = ()


def find_layout(model: Model, name: str) -> Layout:
    """Return a model's layout by name; UserError names the known ones."""
    for layout in model.layouts:
        if layout.name == name:
            return layout
    raise UserError(f"layout={name!r}: {model.name} has no such layout{nearest(name, [x.name for x in model.layouts])}")


def check_folder(source: str | Path, field: str = "") -> Path:
    """Return the path of a folder of weights; UserError, naming ``field``, if it is none or a name on the hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{field}{source}: not a folder")
    on_hub = str(source).count("/") == 1 and not path.is_absolute() and not path.parent.exists()
    hint = f"for example with: hf download {source} --local-dir {source}" if on_hub else "and named by its folder"
    raise UserError(f"{field}{source}: no such folder; a model on the hub must be downloaded first, {hint}")


def open_source(source: str | Path, model: Model, *, preset: str | None = None, ema: bool = False) -> Opened:
    """Detect what a folder is (a run's checkpoint or one of the model's layouts) and open it, reading no weights.

    With ``preset``, the folder must be of that size; with ``ema``, a run whose moving average is meant. UserError names
    the file, key or field that is wrong.
    """
    path = check_folder(source)
    wanted = model.preset(preset) if preset else None
    if is_checkpoint(path):
        run = _Run(path, open_weights(path, ema=ema))
        if run.model not in (None, model.name):
            raise UserError(f"{path}: is a checkpoint of {run.model}, not of {model.name}")
        if run.lora:
            raise UserError(
                f"{path}: holds adapters alone; continue them with lora.init_from={path}, or merge them into "
                f"{run.base or 'their base'} with: convert BASE DST --layout NAME --merge-lora {path}"
            )
        kind = type(next(iter(model.presets.values())))
        config: Any = recipes.validate(kind, run.config, f"{path}: config")  # type: ignore[type-var]
        rows = (Row(name, name) for name in whole(model.build, config)[0])
        opened = Opened(path, config, Table(*rows), run, origins=run.origins)
        loose: tuple[str, ...] = ()
    else:
        if ema:
            raise UserError(f"{path}: is not a run, so it has no moving average")
        layout = next((x for x in model.layouts if x.detect(path)), None)
        if layout is None:
            if any(form.detect(path) for form in FORMATS):
                raise UserError(
                    f"{path}: holds adapters alone; merge them into their base with: convert BASE DST --layout NAME "
                    f"--merge-lora {path}"
                )
            known = ", ".join(f"{x.name} ({x.describe})" if x.describe else x.name for x in model.layouts)
            held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise UserError(
                f"{path}: no weights of {model.name} here; known: {known}, a run's checkpoint; found: {held}"
            )
        config = _complete(layout.read_config(path), layout, model, wanted)
        opened = Opened(path, config, layout.table(config), layout.files.open(path), layout)
        loose = (*layout.loose, *layout.silent)
    if wanted is not None:
        agree(path, config, wanted, f"preset {preset!r}", model, loose)
    return opened


def read_config(source: str | Path, model: Model, *, ema: bool = False) -> Any:
    """Return the configuration of the network a folder holds, with ``ema`` of a run that kept a moving average."""
    return open_source(source, model, ema=ema).config


def _complete(config: Any, layout: Layout, model: Model, wanted: Section | None) -> Any:
    """Fill what the layout cannot carry from the wanted preset, or the one that agrees in all it can."""
    if not layout.silent:
        return config
    said = config.model_dump(exclude=set(layout.silent))
    for preset in [wanted] if wanted is not None else model.presets.values():
        if preset.model_dump(exclude=set(layout.silent)) == said:
            return preset
    return config


def agree(path: Path, config: Any, wanted: Any, whose: str, model: Model, loose: tuple[str, ...] = ()) -> None:
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
        self.lora, self.base = recipe.get("lora"), recipe.get("init_from")
        named = ((recipe.get("data") or {}).get("encoders"), self.base)
        self.origins = tuple(folder for folder in named if folder)

    def names(self) -> list[str]:
        return list(self.opened.names())

    def dtype(self, name: str) -> torch.dtype:
        return self.opened.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.opened.shape(name))

    def where(self, name: str) -> Path:
        return self.path

    def slot(self, name: str) -> None:
        return None

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        whole = self.opened.read(name)
        return whole if length is None else whole.narrow(dim, start, length)


def on_meta(build: Callable[[Any], N], config: Any) -> N:
    """Return the uncut network, built without memory."""
    with torch.device("meta"):
        return build(config)


def whole(build: Callable[[Any], nn.Module], config: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, Placement]]:
    """Return the shape and placement of every parameter of the uncut network, built without memory."""
    net = on_meta(build, config)
    return {name: tuple(p.shape) for name, p in net.named_parameters()}, dict(placements(net))


def check(opened: Opened, bounds: Mapping[str, Bound]) -> None:
    """Raise UserError unless the source has every tensor the table asks for, in its shape, of floats, and no other."""
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
        if not tensors.dtype(name).is_floating_point:
            kind = str(tensors.dtype(name)).removeprefix("torch.")
            raise UserError(
                f"{tensors.where(name)}: {name}: holds {kind}, not floating-point numbers: is it quantized?"
            )
        if tensors.shape(name) != part.shape:
            raise UserError(
                f"{tensors.where(name)}: {name}: has shape {list(tensors.shape(name))}, "
                f"the configuration asks for {list(part.shape)}"
            )


def check_source(source: str | Path, model: Model, config: Any, *, ema: bool = False) -> Opened:
    """Open a folder of weights, reading none; UserError names the first field in which its network is another."""
    opened = open_source(source, model, ema=ema)
    loose = (*opened.layout.loose, *opened.layout.silent) if opened.layout else ()
    agree(opened.path, opened.config, config, "this network", model, loose)
    return opened


def load(
    net: nn.Module,
    source: str | Path,
    model: Model,
    *,
    tp_rank: int = 0,
    tp: int = 1,
    write: Callable[[str, Tensor], None] | None = None,
    ema: bool = False,
) -> None:
    """Read a network's parameters from a hub folder, an original release or a run's checkpoint.

    Only names that ``net`` has are read (it may be one pipeline stage; adapters are left alone), and of each only rank
    ``tp_rank``'s slice of ``tp``. Each is copied into its parameter, or given to ``write(name, tensor)`` on the CPU in
    the folder's dtype, so that a master of more precision than its parameter loses nothing. ``ema`` reads a run's
    moving average. UserError names the file and key, or the field in which folder and network disagree.
    """
    opened = check_source(source, model, net.config, ema=ema)
    shapes, where = whole(model.build, net.config)
    bounds = opened.table.bind(shapes)
    check(opened, bounds)
    targets = {name: p for name, p in net.named_parameters() if not lora.is_factor(name)}

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
        parts = [cast(p.op.join(tensors.read(p.name)), dtype, p.name) for p in bound.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, bound.dim)

    def part_piece(part: Part, start: int, length: int) -> Tensor:
        return cast(_slice(tensors, part, dim, start, length), dtype, part.name)

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


def cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    """Return a tensor in another type, or as it is for None; UserError if a finite value becomes infinite."""
    if dtype is None or dtype == tensor.dtype:
        return tensor
    out = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not out.isfinite().all():
        lost = out.isinf() & tensor.isfinite()
        if lost.any():
            kind, most = str(dtype).removeprefix("torch."), tensor[lost].abs().max().item()
            raise UserError(
                f"{name}: holds {most:.4g}, and the largest {kind} is {torch.finfo(dtype).max:.4g}; keep "
                f"{str(tensor.dtype).removeprefix('torch.')}, or take bf16"
            )
    return out


def _slice(tensors: Source, part: Part, dim: int, start: int, length: int) -> Tensor:
    """Return ``length`` indices from ``start`` along ``dim`` of one part in our form."""
    grain = part.op.grain(dim)
    if grain and start % grain == 0 and length % grain == 0:
        return part.op.join(tensors.read(part.name, dim, start, length))
    return part.op.join(tensors.read(part.name)).narrow(dim, start, length)
