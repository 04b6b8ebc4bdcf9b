"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): ``y = W x + alpha / rank * B A x`` with W frozen.

Adapters are added to a whole network on meta and declare placements like any layer, so that tensor, pipeline and data
parallelism, recomputation, clipping and checkpoints take them as they take other parameters.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError, nearest
from .nn.linear import Linear
from .ops.low_rank import Places
from .parallel.context import ContextParallel
from .parallel.placement import Placement
from .parallel.tensor import TensorParallel
from .recipe import LoraConfig
from .trunk import Noise, Trunk

CHILD = "lora"


@dataclass(frozen=True)
class Target:
    """A Linear that has an adapter, and which of the projections stacked in its output are ``adapted``, by number."""

    linear: Linear
    adapted: tuple[int, ...]


class Adapter(nn.Module):
    """The low-rank update of one Linear; projections stacked in its output have factors of their own.

    ``a`` is ``[projections * rank, in]``, ``b`` ``[out, rank]``: rows are stacked as the weight's are, so that each
    projection is a slice of both; those that are not ``adapted`` (None: all are) have none. What follows the weight's
    cut is ``b`` where the output is shared out, ``a`` where the input is, in the parts ``inputs``; the other factor is
    a replica. ``name`` is the Linear's, ``noise`` the network's.
    """

    tp: TensorParallel | None = None
    cp: ContextParallel | None = None

    def __init__(
        self, linear: Linear, config: LoraConfig, name: str, noise: Noise, adapted: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.name, self.noise = name, noise
        self.split, self.unit, self.tokens = linear.split, linear.unit, linear.tokens
        self.projections, self.inputs = linear.projections, linear.parts if linear.split == "in" else ()
        self.adapted = tuple(range(len(self.projections))) if adapted is None else adapted
        self.parts = tuple(self.projections[number] for number in self.adapted)
        self.scale, self.dropout = config.scale, config.dropout
        self.in_features = linear.in_features
        self.a = nn.Parameter(torch.empty(len(self.parts) * config.rank, linear.in_features))
        self.b = nn.Parameter(torch.empty(sum(self.parts), config.rank))

    def placements(self) -> dict[str, Placement]:
        """Return where the factors live; a replica that sees this rank's tokens alone has a partial gradient."""
        replica = Placement(partial=self._shares_tokens)
        if self.split == "out":
            return {"a": replica, "b": Placement(0, self.parts, self.unit)}
        if self.split == "in":
            return {"a": Placement(1, self.inputs, self.unit), "b": replica}
        return {"a": replica, "b": replica}

    @property
    def _shares_tokens(self) -> bool:
        return self.tp is not None and self.tp.sequence and self.tokens != "all"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Places]:
        """Map the Linear's input to what is added to its output, as ``ops.add_low_rank`` takes it."""
        x = self._drop(x)
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        if self.tp is None or self.split is None:
            low = F.linear(x, a)
        elif self.split == "out":
            # Only the few features between the factors cross ranks.
            low = self.tp.enter(F.linear(x, a), self._shares_tokens)
        else:
            low = self.tp.row(x, a, None, self._shares_tokens)
        sizes = [size * len(b) // sum(self.parts) for size in self.projections]
        places = tuple((sum(sizes[:number]), sizes[number]) for number in self.adapted)
        return self.scale * low, b, places  # scaled here, where there are few features

    def _drop(self, x: Tensor) -> Tensor:
        """Drop inputs at random; ranks that share the input draw the mask of the whole, and each takes its part."""
        if not (self.training and self.dropout):
            return x
        cp = self.cp if self.tokens == "own" else None
        features = self.tp if self.split == "in" else None
        tokens = self.tp if self.split != "in" and self.tokens == "own" and self._shares_tokens else None
        shape = list(x.shape)
        if cp is not None:
            shape[0] = self.noise.tokens
        elif tokens is not None:
            shape[0] *= tokens.size
        if features is not None:
            shape[-1] *= features.size
        dropped = self.noise.uniform(shape, self.name, x.device) < self.dropout
        if cp is not None:
            dropped = dropped.narrow(0, *cp.share(len(dropped)))
        if tokens is not None:
            dropped = dropped.chunk(tokens.size, 0)[tokens.rank]
        if features is not None:
            dropped = Placement(dropped.dim() - 1, self.inputs).narrow(dropped, features.rank, features.size)
        return x.masked_fill(dropped, 0) / (1 - self.dropout)


def attach(net: Trunk, config: LoraConfig) -> Trunk:
    """Freeze a whole network on meta and add adapters to the Linears its targets name; return the network.

    UserError for a pattern that names none, with the nearest names.
    """
    chosen = targets(net, config)
    net.requires_grad_(False)
    noise = Noise()
    for name, target in chosen.items():
        with torch.device(target.linear.weight.device):
            target.linear.lora = Adapter(target.linear, config, name, noise, target.adapted)
    if config.dropout:
        net.noise = noise
    return net


def targets(net: Trunk, config: LoraConfig) -> dict[str, Target]:
    """Return the Linears that a recipe's patterns name, all of those in blocks if it has none.

    A projection stacked in a Linear's output has the Linear's name and its number from 0, as ``qkv.0``.
    """
    known = {name: module for name, module in net.named_modules() if isinstance(module, Linear)}
    if not config.targets:
        found = {name: Target(module, _all(module)) for name, module in known.items() if name.startswith("blocks.")}
        if not found:
            raise UserError("lora: the network's blocks hold no linear layer that takes adapters")
        return found
    chosen: dict[str, set[int]] = {}
    for pattern in config.targets:
        hits = list(_named(known, pattern))
        if not hits:
            raise UserError(f"lora.targets: {pattern!r} names no linear layer{nearest(pattern, _short(known))}")
        for name, numbers in hits:
            chosen.setdefault(name, set()).update(numbers)
    return {name: Target(module, tuple(sorted(chosen[name]))) for name, module in known.items() if name in chosen}


def _all(linear: Linear) -> tuple[int, ...]:
    return tuple(range(len(linear.projections)))


def _named(known: Mapping[str, Linear], pattern: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each Linear that a pattern names, itself or some of its projections, with the numbers of these."""
    for name, linear in known.items():
        if matches(name, pattern):
            yield name, _all(linear)
        elif len(linear.projections) > 1:
            numbers = tuple(number for number in _all(linear) if matches(f"{name}.{number}", pattern))
            if numbers:
                yield name, numbers


def patterns(net: Trunk, wanted: Mapping[str, Iterable[int]]) -> list[str]:
    """Return what ``targets`` must be to name just these projections of these Linears.

    An end of names stands for all that have it, where it names no others.
    """
    known = {name: module for name, module in net.named_modules() if isinstance(module, Linear)}
    groups: dict[str, list[str]] = {}
    for name, linear in known.items():
        numbers = sorted(wanted.get(name, ()))
        whole = tuple(numbers) == _all(linear)
        for spelled in [name] if whole else [f"{name}.{number}" for number in numbers]:
            groups.setdefault(re.split(r"\.\d+\.", spelled, maxsplit=1)[-1], []).append(spelled)
    found = []
    for end, names in groups.items():
        meant = {name: set(numbers) for name, numbers in _named(known, end)}
        found += [end] if all(meant[name] <= set(wanted.get(name, ())) for name in meant) else names
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a glob names a module: by its whole name or by what follows one of its dots."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[i:]), pattern) for i in range(len(parts)))


def _short(names: Mapping[str, Linear]) -> list[str]:
    """Return the names with a block's number as a star."""
    return list(dict.fromkeys(".".join("*" if p.isdigit() else p for p in name.split(".")) for name in names))


def is_factor(name: str) -> bool:
    """Whether a parameter is an adapter's, by its name."""
    return name.split(".")[-2:-1] == [CHILD]


def adapters(net: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield every adapter with the name of the Linear it belongs to."""
    for name, module in net.named_modules():
        if isinstance(module, Adapter):
            yield name.removesuffix(f".{CHILD}"), module


def initialise(name: str, whole: Tensor, generator: torch.Generator) -> None:
    """Fill a whole factor: A uniform in +-1 / sqrt(in), as peft's default, and B zero, so that training starts at W."""
    if name.endswith(".b"):
        whole.zero_()
    else:
        bound = 1 / math.sqrt(whole.shape[1])
        whole.uniform_(-bound, bound, generator=generator)


def check_stages(net: Trunk, pp: int) -> None:
    """Raise UserError if an adapted network has a pipeline stage without adapters: it would have nothing to learn."""
    with_adapters = [any(is_factor(n) for n, _ in block.named_parameters()) for block in net.blocks.children()]
    per = len(with_adapters) // pp
    empty = [stage for stage in range(pp) if any(with_adapters) and not any(with_adapters[stage * per :][:per])]
    if pp > 1 and empty:
        raise UserError(
            f"parallel.pp={pp}: stage {empty[0]}, blocks {empty[0] * per} to {empty[0] * per + per - 1}, has no "
            "adapter; widen lora.targets or lower parallel.pp"
        )


def check_dropout(net: Trunk, cp: int, sequence: bool) -> None:
    """Raise UserError if ranks share out tokens of several streams: a layer's dropout would depend on the layout."""
    if net.noise is not None and net.streams and (cp > 1 or sequence):
        field = f"parallel.cp={cp}" if cp > 1 else "parallel.sequence=true"
        raise UserError(
            f"lora.dropout: not with {field} in this network, whose text and image tokens have layers of their own; "
            "set lora.dropout=0"
        )
