"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), for tokens in a row and on a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor]


def rope_tables(positions: Tensor, dim: int, theta: float) -> Tables:
    """Return cos and sin ``[tokens, dim]`` in fp32 for integer positions; element i pairs with i + dim/2."""
    angle = _angles(positions, dim, theta, torch.float32)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def grid_rope_tables(grid: Sequence[int], dims: Sequence[int], theta: float, device: torch.device) -> Tables:
    """Return cos and sin ``[tokens, sum of dims]`` in fp32 for the cells of a grid, the last axis fastest.

    Axis a turns ``dims[a]`` of the elements by its own coordinate; element 2i pairs with 2i + 1.
    """
    axes = [torch.arange(size, device=device) for size in grid]
    cells = torch.cartesian_prod(*axes).view(-1, len(axes))
    # In fp64 up to the angle, as the original: far tokens at the highest frequency need the digits.
    angles = [_angles(cells[:, a], dim, theta, torch.float64) for a, dim in enumerate(dims)]
    angle = torch.cat(angles, -1).repeat_interleave(2, -1)
    return angle.cos().float(), angle.sin().float()


def _angles(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim)
    return positions.to(dtype)[:, None] * frequency


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [tokens, heads, dim]`` by the tables ``[tokens, dim]``; element i pairs with i + dim/2."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.addcmul(x * cos, turned, sin)


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [tokens, ..., dim]`` by the tables ``[tokens, dim]``, in fp32 or wider; 2i pairs with 2i + 1."""
    shape = (len(x), *(1,) * (x.dim() - 2), x.shape[-1])
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), -1).flatten(-2)
    return (x * cos.view(shape) + turned * sin.view(shape)).to(x.dtype)
