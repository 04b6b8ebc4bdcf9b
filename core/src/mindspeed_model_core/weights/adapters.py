"""Adapters as files: peft's and diffusers' folders and runs of adapters, read, written, and merged into weights.

A published folder has one pair of factors for each of the layout's modules; where our Linear stacks several of them,
its adapter stacks theirs, so that the weight table of the layout says all there is to say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checkpoint, lora
from .. import recipe as recipes
from ..errors import UserError, nearest
from ..files import read_json, write_json
from ..nn.linear import Linear
from ..recipe import LoraConfig
from .folder import new_folder
from .layout import ADAPTER_CONFIG, DIFFUSERS, FORMATS, AdapterFormat, Bound, Layout
from .source import agree, cast, check_folder, on_meta, whole
from .tensorfile import Reader, Spec, Writer, create_safetensors, open_safetensors, read_metadata

if TYPE_CHECKING:
    from ..model import Model
    from ..parallel.shard import Shard
    from ..trunk import Trunk

_METADATA = "lora_adapter_metadata"
# The ends of keys: peft's and diffusers', and those of trainers for the original releases.
_ENDS = (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"))
_LEAVES = (*_ENDS[0], *_ENDS[1], "alpha")
# What precedes the original layers' names, in the latter case with underscores for dots.
_BARE, _FLAT = "diffusion_model.", "lora_unet_"
# And what precedes those of text encoders, which some of these trainers adapt as well.
_TEXT = ("text_encoder", "lora_te")
# What peft can do to a layer beside adding B A x, and the value that leaves it out.
_PLAIN: dict[str, Any] = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}


@dataclass(frozen=True)
class Pair:
    """The factors of one projection, to be read: A ``[rank, in]``, B ``[out, rank]`` in our order of rows."""

    rank: int
    scale: float
    read: Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Adapters:
    """An opened source of adapters: each of our Linears' projections in their order; None: it has no adapter."""

    path: Path
    pairs: dict[str, tuple[Pair | None, ...]]
    sizes: dict[str, tuple[int, ...]]
    called: Callable[[str, int], str]

    def add(self, name: str, weight: Tensor) -> Tensor:
        """Return a Linear's whole weight with its update added, computed in fp32 or wider."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for pair, rows in zip(self.pairs[name], wide.split(self.sizes[name]), strict=True):
            if pair is not None:
                a, b = (factor.to(wide.dtype) for factor in pair.read())
                rows.addmm_(b, a, alpha=pair.scale)
        return wide.to(weight.dtype)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a Linear's stacked factors."""
        read = [pair.read() for pair in self.pairs[name] if pair is not None]
        return torch.cat([a for a, _ in read]), torch.cat([b for _, b in read])

    @property
    def numbers(self) -> dict[str, tuple[int, ...]]:
        """Return each adapted Linear's adapted projections, by number."""
        return {name: tuple(i for i, pair in enumerate(pairs) if pair) for name, pairs in self.pairs.items()}

    def check(self, config: LoraConfig, net: Trunk) -> None:
        """Raise UserError unless these are the adapters that the recipe gives a network, of its rank and scale.

        It says all that the recipe has to say instead, or that no recipe can.
        """
        wanted = lora.targets(net, config)
        found = [(name, pair) for name, pairs in self.pairs.items() for pair in pairs if pair]
        first, merge = found[0], "merge them instead: convert --merge-lora"
        for name, pair in found:
            for what in ("rank", "scale"):
                of, other = getattr(first[1], what), getattr(pair, what)
                if not math.isclose(of, other):
                    raise UserError(
                        f"{self.path}: has adapters of {what} {of:g} ({first[0]}) and {other:g} ({name}); those of a "
                        f"run have one; {merge}"
                    )
        for name in self.pairs:
            linear = net.get_submodule(name)
            if not isinstance(linear, Linear):
                key = self.called(name, 0)
                raise UserError(f"{self.path}: {key}: adapts {name}, which runs do not; {merge}")
            if self.sizes[name] != linear.projections:
                raise UserError(
                    f"{self.path}: has one pair of factors for all that {name} stacks, where a run has a pair for each "
                    f"of {len(linear.projections)} projections; {merge}"
                )
        rank, alpha = first[1].rank, first[1].scale * first[1].rank
        wrong: list[tuple[str, str]] = []
        if rank != config.rank:
            wrong.append((f"lora.rank={config.rank}: {self.path} has rank {rank}", f"lora.rank={rank}"))
        if rank != config.rank and config.alpha is not None or not math.isclose(first[1].scale, config.scale):
            ours = config.scale * config.rank
            wrong.append((f"lora.alpha={ours:g}: {self.path} has alpha {alpha:g}", f"lora.alpha={alpha:g}"))
        if self.numbers != {name: target.adapted for name, target in wanted.items()}:
            names = ",".join(lora.patterns(net, self.numbers))
            wrong.append((self._difference(wanted), f"'lora.targets=[{names}]'"))
        if wrong:
            settings = " ".join(setting for _, setting in wrong)
            raise UserError(f"{wrong[0][0]}; to go on with what it holds, set {settings}")

    def _difference(self, wanted: Mapping[str, lora.Target]) -> str:
        """Return, in words, the first adapter that these have and the recipe has not, or the other way round."""
        have = self.numbers
        for name, target in wanted.items():
            missing = [number for number in target.adapted if number not in have.get(name, ())]
            if missing:
                return f"{self.path}: missing key {self.called(name, missing[0])!r}; lora.targets names it"
        for name, numbers in have.items():
            if name not in wanted:
                return f"{self.path}: adapts {name}, which lora.targets leaves out"
            beyond = [number for number in numbers if number not in wanted[name].adapted]
            if beyond:
                return f"{self.path}: adapts {name}.{beyond[0]}, which lora.targets leaves out"
        raise AssertionError("they are the same")


def is_run(source: str | Path) -> bool:
    """Whether a path is a checkpoint, or a run's folder, of a run that trains adapters."""
    path = Path(source).expanduser()
    return checkpoint.is_checkpoint(path) and _lora_of(checkpoint.read_info(checkpoint.locate(path))) is not None


def _lora_of(info: Mapping[str, Any]) -> dict[str, Any] | None:
    return (info.get("recipe") or {}).get("lora")


# ------------------------------------------------------------------------------------------------ read


def open_adapters(source: str | Path, model: Model, config: Any, *, ema: bool = False) -> Adapters:
    """Open a peft or diffusers folder, a file of adapters alone, or a run of adapters, reading no factors.

    A file's keys may also be those of the original release's layers, behind ``diffusion_model.`` or ``lora_unet_``.
    UserError for an adapter of another model or kind, a key that is missing or unknown, or a shape that does not fit.
    """
    path = Path(source).expanduser()
    if path.is_file():
        form = next((form for form in FORMATS if form.file == path.name), DIFFUSERS)
        return _open_file(path, path, form, model, config)
    path = check_folder(path)
    if checkpoint.is_checkpoint(path):
        return _open_run(path, model, config, ema)
    for form in FORMATS:
        if form.detect(path):
            return _open_file(path, path / form.file, form, model, config)
    held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
    known = " or ".join(form.file for form in FORMATS)
    raise UserError(f"{path}: no adapter here; it would hold {known}, or be a run of adapters; found: {held}")


def _open_run(path: Path, model: Model, config: Any, ema: bool) -> Adapters:
    opened = checkpoint.open_weights(path, ema=ema)
    section = _lora_of(opened.info)
    if opened.info.get("model") != model.name:
        raise UserError(f"{path}: is a checkpoint of {opened.info.get('model')}, not of {model.name}")
    if section is None:
        raise UserError(f"{path}: is a run of whole weights, not of adapters")
    theirs = recipes.validate(type(config), opened.config, f"{path}: config")
    loose = tuple(field for layout in model.layouts for field in (*layout.loose, *layout.silent))
    agree(path, theirs, config, "the network to adapt", model, loose)
    choice = recipes.validate(LoraConfig, section, f"{path}: lora")
    found = lora.targets(on_meta(model.build, config), choice)
    pairs: dict[str, tuple[Pair | None, ...]] = {}
    sizes = {name: target.linear.projections for name, target in found.items()}
    held = set(opened.names())

    def read(name: str, index: int) -> tuple[Tensor, Tensor]:
        a, b = (opened.read(f"{name}.{lora.CHILD}.{leaf}") for leaf in "ab")
        before = [number for number in found[name].adapted if number < index]
        start = sum(sizes[name][number] for number in before)
        return a.narrow(0, len(before) * choice.rank, choice.rank), b.narrow(0, start, sizes[name][index])

    for name, target in found.items():
        for leaf in "ab":
            if f"{name}.{lora.CHILD}.{leaf}" not in held:
                raise UserError(f"{path}: missing key {f'{name}.{lora.CHILD}.{leaf}'!r}")
        pairs[name] = tuple(
            Pair(choice.rank, choice.scale, lambda name=name, i=i: read(name, i))  # type: ignore[misc]
            if i in target.adapted
            else None
            for i in range(len(sizes[name]))
        )
    return Adapters(path, pairs, sizes, lambda name, index: f"{name}.{lora.CHILD}.a")


def _open_file(path: Path, file: Path, form: AdapterFormat, model: Model, config: Any) -> Adapters:
    shapes, _ = whole(model.build, config)
    adapted = _adapted_layout(model)
    reader = Reader({name: ([slot], 0) for name, slot in open_safetensors(file).items()})
    said = _Said.of(file, form)
    keys: dict[str, dict[str, str]] = {}
    for key in reader.names():
        stem, leaf = _split(key)
        keys.setdefault(stem, {})[leaf] = key
    if not keys:
        raise UserError(f"{file}: holds no adapter")
    # The layers' names are those of one of the model's layouts, that which knows most of them.
    layouts = sorted(model.layouts, key=lambda each: each is not adapted)
    tables = [layout.table(config).bind(shapes) for layout in layouts]
    bounds, where = min(
        ((bounds, _modules(bounds, form)) for bounds in tables), key=lambda each: len(keys.keys() - each[1].keys())
    )
    for stem in sorted(keys.keys() - where.keys()):
        leaf, key = next(iter(keys[stem].items()))
        if stem.startswith(_TEXT):
            raise UserError(
                f"{file}: {key!r} adapts a text encoder, which stays as it is here; keep the network's adapters alone, "
                f"keys that begin with {form.prefix!r}"
            )
        raise UserError(
            f"{file}: unknown key {key!r}: {model.name} has no such linear layer"
            f"{nearest(key, [f'{spelled}.{leaf}' for spelled in where])}; read are keys in peft's, diffusers' and the "
            f"original layers' names, the latter after {_BARE} or {_FLAT}"
        )
    found: dict[str, list[Pair | None]] = {}
    for stem, leaves in keys.items():
        name, index, module = where[stem]
        bound = bounds[f"{name}.weight"]
        pairs = found.setdefault(name, [None] * len(bound.parts))
        if pairs[index] is not None:
            raise UserError(f"{file}: {stem}: another key adapts the same layer, {module}")
        pairs[index] = _pair(reader, stem, leaves, module, bound, index, said)
    return Adapters(
        path,
        {name: tuple(pairs) for name, pairs in found.items()},
        {name: tuple(part.size for part in bounds[f"{name}.weight"].parts) for name in found},
        lambda name, index: f"{form.prefix}{bounds[f'{name}.weight'].parts[index].name[:-7]}.lora_A.weight",
    )


def _split(key: str) -> tuple[str, str]:
    """Return the layer a key names, and what of it: one of _LEAVES, or anything."""
    for leaf in _LEAVES:
        if key.endswith(f".{leaf}"):
            return key.removesuffix(f".{leaf}"), leaf
    return key, ""


def _modules(bounds: Mapping[str, Bound], form: AdapterFormat) -> dict[str, tuple[str, int, str]]:
    """Return our Linear, the place of the projection in it, and the layer's own name, by all that files call it."""
    out = {}
    for name, bound in bounds.items():
        for index, part in enumerate(bound.parts if len(bound.shape) == 2 else ()):
            module = part.name.removesuffix(".weight")
            for spelled in (f"{form.prefix}{module}", module, f"{_BARE}{module}", _FLAT + module.replace(".", "_")):
                out[spelled] = name.removesuffix(".weight"), index, module
    return out


def _pair(
    reader: Reader, stem: str, leaves: Mapping[str, str], module: str, bound: Bound, index: int, said: _Said
) -> Pair:
    """Return the pair of one module after seeing that its shapes are the projection's."""
    _check_rows(bound)
    part = bound.parts[index]
    ends = _ENDS[1] if leaves.keys() & set(_ENDS[1]) else _ENDS[0]
    keys = [f"{stem}.{leaf}" for leaf in ends]
    for key in keys:
        if key not in reader.slots:
            raise UserError(f"{said.path}: missing key {key!r}")
    rank = said.rank(module) or reader.shape(keys[0])[0]
    for key, want in zip(keys, ((rank, part.shape[1]), (part.shape[0], rank)), strict=True):
        if reader.shape(key) != want:
            raise UserError(f"{said.path}: {key}: has shape {list(reader.shape(key))}, expected {list(want)}")
    alpha = float(reader.read(leaves["alpha"])) if "alpha" in leaves else said.alpha(module, rank)
    scale = alpha / (math.sqrt(rank) if said.values.get("use_rslora") else rank)
    return Pair(rank, scale, lambda: (reader.read(keys[0]), part.op.join(reader.read(keys[1]))))


@dataclass(frozen=True)
class _Said:
    """What a folder's configuration says of ranks and scales, in peft's words."""

    path: Path
    values: dict[str, Any]

    @classmethod
    def of(cls, file: Path, form: AdapterFormat) -> _Said:
        if form.in_file:
            try:
                raw = json.loads(read_metadata(file).get(_METADATA, "{}"))
            except ValueError as error:
                raise UserError(f"{file}: {_METADATA}: not valid JSON: {error}") from None
            values = {key.removeprefix(form.prefix): value for key, value in raw.items()}
        else:
            file = file.with_name(ADAPTER_CONFIG)
            values = read_json(file)
            for key in ("r", "lora_alpha"):
                if not isinstance(values.get(key), (int, float)) or values[key] <= 0:
                    raise UserError(f"{file}: {key}={values.get(key)!r}: expected a number above 0")
        if values.get("peft_type", "LORA") != "LORA":
            raise UserError(f"{file}: peft_type={values['peft_type']!r} is not supported, only 'LORA'")
        for key, plain in _PLAIN.items():
            if (found := values.get(key)) not in (None, [], plain):
                raise UserError(f"{file}: {key}={found!r} is not supported, only {key}={plain!r}")
        return cls(file, values)

    def rank(self, module: str) -> int | None:
        return self._of(module, "rank_pattern", self.values.get("r"))

    def alpha(self, module: str, rank: int) -> float:
        return float(self._of(module, "alpha_pattern", self.values.get("lora_alpha", rank)))

    def _of(self, module: str, patterns: str, default: Any) -> Any:
        # peft's own rule: a pattern is a regular expression of the name's end.
        for pattern, value in (self.values.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default


def _adapted_layout(model: Model) -> Layout:
    for layout in model.layouts:
        if layout.adapter is not None:
            return layout
    raise UserError(f"{model.name}: none of its layouts has a published form of adapters")


def _check_rows(bound: Bound) -> None:
    """Raise UserError unless the layout stacks and orders rows alone, so that A is the same in both."""
    if bound.dim != 0 or len(bound.shape) != 2 or any(part.op.grain(1) != 1 for part in bound.parts):
        raise UserError(f"{bound.name}: the layout rearranges its columns, so it has no adapter there")


def load(shards: Mapping[str, Shard], source: str | Path, model: Model, config: Any, choice: LoraConfig) -> None:
    """Write this process's adapters from a source; UserError where it does not fit the recipe's ``lora``."""
    opened = check_source(source, model, config, choice)
    for name in opened.pairs:
        mine = [shards.get(f"{name}.{lora.CHILD}.{leaf}") for leaf in "ab"]
        if any(mine):
            for shard, factor in zip(mine, opened.factors(name), strict=True):
                assert shard is not None
                shard.write(shard.placement.narrow(factor, shard.tp_rank, shard.tp))


def check_source(source: str | Path, model: Model, config: Any, choice: LoraConfig) -> Adapters:
    """Open adapters, reading none; UserError unless they fit the network and the recipe's ``lora``."""
    opened = open_adapters(source, model, config)
    opened.check(choice, on_meta(model.build, config))
    return opened


# ------------------------------------------------------------------------------------------------ write


def convert(
    source: str | Path,
    destination: str | Path,
    model: Model,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a run's adapters as a folder that peft or diffusers reads, in the names of the layout."""
    form = layout.adapter
    if form is None:
        known = [x.name for x in model.layouts if x.adapter is not None]
        hint = f"use {known[0]!r}, or merge them: --merge-lora" if known else "merge them: --merge-lora"
        raise UserError(f"layout={layout.name!r}: has no form of adapters, and {source} holds adapters; {hint}")
    path = checkpoint.locate(check_folder(source))
    info = checkpoint.read_info(path)
    config = recipes.validate(type(next(iter(model.presets.values()))), info["config"], f"{path}: config")
    opened = open_adapters(path, model, config, ema=ema)
    choice = recipes.validate(LoraConfig, _lora_of(info) or {}, f"{path}: lora")
    shapes, _ = whole(model.build, config)
    bounds = layout.table(config).bind(shapes)
    tensors = dict(_published(opened, bounds, form, dtype))
    names = {name: [part.name.removesuffix(".weight") for part in bound.parts] for name, bound in bounds.items()}
    modules = {names[f"{name}.weight"][number] for name, numbers in opened.numbers.items() for number in numbers}
    everything = {module for each in names.values() for module in each}
    said = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": info["recipe"].get("init_from"),
        "r": choice.rank,
        "lora_alpha": choice.rank if choice.alpha is None else choice.alpha,
        "lora_dropout": choice.dropout,
        "target_modules": _target_modules(modules, everything),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }
    metadata = {"format": "pt"}
    if form.in_file:
        metadata[_METADATA] = json.dumps({form.prefix + key: value for key, value in said.items() if value is not None})
    with new_folder(Path(destination), overwrite, FORMATS, source=path) as folder:
        specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        file, slots = create_safetensors(folder / form.file, specs, metadata)
        writer = Writer([file], {name: ([slot], 0) for name, slot in slots.items()})
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
        if not form.in_file:
            write_json(folder / ADAPTER_CONFIG, said)


def _published(
    opened: Adapters, bounds: Mapping[str, Bound], form: AdapterFormat, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    for name, pairs in opened.pairs.items():
        bound = bounds[f"{name}.weight"]
        _check_rows(bound)
        if tuple(part.size for part in bound.parts) != opened.sizes[name]:
            raise UserError(
                f"{name}: its adapter has parts of {opened.sizes[name]} rows, the layout's are "
                f"{tuple(part.size for part in bound.parts)}"
            )
        for part, pair in zip(bound.parts, pairs, strict=True):
            if pair is not None:
                a, b = pair.read()
                start = form.prefix + part.name.removesuffix("weight")
                for key, factor in ((f"{start}lora_A.weight", a), (f"{start}lora_B.weight", part.op.split(b))):
                    yield key, cast(factor, dtype, key)


def _target_modules(modules: set[str], everything: set[str]) -> list[str]:
    """Return the ends of names that mean these modules and no others, or the whole names where there are none."""
    ends = {re.split(r"\.\d+\.", module, maxsplit=1)[-1] for module in modules}
    meant = {m for m in everything if any(m == end or m.endswith(f".{end}") for end in ends)}
    return sorted(ends if meant == modules else modules)
