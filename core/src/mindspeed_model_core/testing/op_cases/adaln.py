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
_LARGE = draw(37, 2, 1280), draw(2, 1280), draw(2, 1280, seed=1)
_PARTS = draw(2, 3, 96).unbind(1)
"""Shifts and scales of two samples, as a layer has made them side by side."""
CASES = (
    *(
        case
        for shape in SHAPES
        for name in ("x".join(map(str, shape)),)
        for case in (
            Case(ops.adaln, name, (draw(*shape), draw(*shape[1:]), draw(*shape[1:], seed=1)), _adaln, (EPS,)),
            Case(ops.gated_add, name, (draw(*shape), draw(*shape, seed=1), draw(*shape[1:])), _gated),
        )
    ),
    Case(ops.adaln, "37x2x1280, modulations in fp32", _LARGE, _adaln, (EPS,), wide=(1, 2)),
    Case(ops.adaln, "learning a scale alone", _LARGE, _adaln, (EPS,), constant=(0, 1)),
    Case(ops.adaln, "constant modulations", _LARGE, _adaln, (EPS,), constant=(1, 2)),
    Case(ops.adaln, "modulations side by side", (draw(70, 2, 96), *_PARTS[:2]), _adaln, (EPS,)),
)
