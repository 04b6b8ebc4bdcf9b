"""Norms."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from .case import Case, draw

EPS = 1e-5


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


CASES = tuple(
    Case(ops.rms_norm, "x".join(map(str, shape)), (draw(*shape), draw(shape[-1], seed=1)), _rms, (EPS,))
    for shape in ((70, 96), (7, 3, 130), (1, 8), (0, 8))
)
# Features as small as eps: another eps would show.
CASES += (Case(ops.rms_norm, "small", (EPS**0.5 * draw(7, 16), draw(16, seed=1)), _rms, (EPS,)),)
