"""Gated activations."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from .case import Case, draw


def _swiglu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return a * torch.sigmoid(a) * b


CASES = tuple(
    Case(ops.swiglu, "x".join(map(str, shape)), (draw(*shape),), _swiglu) for shape in ((70, 96), (3, 5, 14), (0, 8))
)
