"""Activations, gated or beside something else, and parts of one projection."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from .case import Case, draw


def _swiglu(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return a * torch.sigmoid(a) * b


def _join_gelu(y: Tensor, x: Tensor) -> Tensor:
    return torch.cat((y, x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))), -1)


def _apart(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return tuple(x.unflatten(-1, (count, -1)).unbind(-2))


CASES = (
    *(
        Case(ops.swiglu, "x".join(map(str, shape)), (draw(*shape),), _swiglu)
        for shape in ((70, 96), (3, 5, 14), (0, 8))
    ),
    *(
        Case(ops.join_gelu, "x".join(map(str, shape)), (draw(*shape), draw(*shape[:-1], 4 * shape[-1])), _join_gelu)
        for shape in ((70, 2, 24), (5, 1, 7), (0, 2, 8))
    ),
    *(
        Case(ops.apart, f"{'x'.join(map(str, shape))}-{count}", (draw(*shape),), _apart, (count,))
        for shape, count in (((70, 96), 3), ((5, 2, 14), 2), ((0, 8), 2))
    ),
)
