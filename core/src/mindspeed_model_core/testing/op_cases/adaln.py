"""Adaptive layer norm and gated sums."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from .case import Case, draw

EPS = 1e-2  # large enough for its loss to show


def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + scale) + shift


def _gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate * y


SHAPES = ((70, 2, 96), (7, 3, 130), (1, 1, 8), (0, 2, 8))
CASES = tuple(
    case
    for shape in SHAPES
    for name in ("x".join(map(str, shape)),)
    for case in (
        Case(ops.adaln, name, (draw(*shape), draw(*shape[1:]), draw(*shape[1:], seed=1)), _adaln, (EPS,)),
        Case(ops.gated_add, name, (draw(*shape), draw(*shape, seed=1), draw(*shape[1:])), _gated),
    )
)
