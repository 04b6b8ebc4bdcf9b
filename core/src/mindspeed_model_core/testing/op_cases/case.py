"""One set of operands of an op, and how a result is held against the formula."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ...ops.table import Entry, Op, at_level
from ..tolerance import assert_close


@dataclass(frozen=True)
class Case:
    """Operands of an op and the formula, written apart from the op, that it computes.

    ``operands`` are made by ``draw`` in fp32; those of floating point are cast to the type under test and get
    gradients. ``rest`` follows them in the call, moved to the device where it holds tensors. ``formula`` is called
    alike, in fp64 on the CPU. ``wide`` are the positions of operands that are fp32 at least, ``constant`` of those
    that get no gradients, ``unused`` of values that get none. ``only`` are the types that the op is for, if not all,
    and ``reference_on`` the kinds of device that have entries none of which takes these operands.
    """

    op: Op[Any, Any]
    name: str
    operands: tuple[Tensor, ...]
    formula: Callable[..., Any]
    rest: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)
    wide: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()
    only: tuple[torch.dtype, ...] = ()
    reference_on: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.op.name}-{self.name}"

    def cast(self, device: torch.device | None, dtype: torch.dtype) -> list[Tensor]:
        """Return the operands on a device, in the type under test."""
        return [self._cast(n, x, device, dtype) for n, x in enumerate(self.operands)]

    def _cast(self, n: int, x: Tensor, device: torch.device | None, dtype: torch.dtype) -> Tensor:
        if not x.is_floating_point():
            return x.to(device)
        wanted = torch.promote_types(dtype, torch.float32) if n in self.wide else dtype
        return x.detach().to(device, wanted).requires_grad_(n not in self.constant)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers in fp32, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + sum(shape)))


@dataclass(frozen=True)
class Outcome:
    """What served an op, its values and the gradients of its operands, on the CPU in fp64."""

    entry: Entry | None
    tensors: dict[str, Tensor]


def serving(case: Case, kind: str, dtype: torch.dtype) -> Entry | None:
    """Return what would serve a case in a type on a kind of device, which need not be here."""
    operands = case.cast(torch.device("cpu"), dtype)
    return case.op.serving(kind, *operands, *case.rest, **case.named)


def run(case: Case, device: torch.device, dtype: torch.dtype, kind: str | None = None) -> Outcome:
    """Compute an op and its gradients on a device, by what serves it there or on another ``kind`` of device.

    Raises AssertionError if a value's type is not the reference's.
    """
    operands = case.cast(device, dtype)
    rest = [_moved(x, device) for x in case.rest]
    entry = case.op.serving(kind or device.type, *operands, *rest, **case.named)
    function = case.op if kind is None else case.op.reference if entry is None else entry.function
    made = function(*operands, *rest, **case.named)
    types, right = [x.dtype for x in _listed(made)], _types(case, dtype)
    assert types == right, f"values are {types}, the reference's {right}"
    return Outcome(entry, _differentiate(made, operands, case.unused))


def _types(case: Case, dtype: torch.dtype) -> list[torch.dtype]:
    operands = case.cast(torch.device("cpu"), dtype)
    with torch.no_grad(), at_level(0):
        return [x.dtype for x in _listed(case.op(*operands, *case.rest, **case.named))]


def wanted(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the formula's values and gradients in fp64, for operands rounded to ``dtype``."""
    rounded = replace(case, operands=tuple(case.cast(torch.device("cpu"), dtype)))
    operands = rounded.cast(None, torch.float64)
    return _differentiate(case.formula(*operands, *case.rest, **case.named), operands, case.unused)


def check(case: Case, device: torch.device, dtype: torch.dtype, bound: float) -> Outcome:
    """Hold an op against its formula; differences count as a share of the largest wanted value of each tensor."""
    found = run(case, device, dtype)
    assert_close(found.tensors, wanted(case, dtype), bound)
    return found


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _listed(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made)


def _differentiate(made: Any, operands: list[Tensor], unused: tuple[int, ...]) -> dict[str, Tensor]:
    outs = _listed(made)
    found = {f"value {n}": out for n, out in enumerate(outs)}
    used = [out for n, out in enumerate(outs) if n not in unused]
    smooth = [out for out in used if out.is_floating_point() and out.requires_grad]
    learn = {f"gradient {n}": x for n, x in enumerate(operands) if x.requires_grad}
    if smooth and learn:
        weights = [draw(*out.shape, seed=9).to(out.device, out.dtype) for out in smooth]
        grads = torch.autograd.grad(smooth, list(learn.values()), weights, allow_unused=True)
        zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(learn.values(), grads, strict=True))
        found |= dict(zip(learn, zeros, strict=True))
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


def in_types(cases: Iterable[Case], dtypes: Iterable[torch.dtype]) -> list[Any]:
    """Return every case with every type that it is for, as a test's parameters."""
    return [
        pytest.param(case, dtype, id=f"{case}-{str(dtype).removeprefix('torch.')}")
        for case in cases
        for dtype in dtypes
        if not case.only or dtype in case.only
    ]
