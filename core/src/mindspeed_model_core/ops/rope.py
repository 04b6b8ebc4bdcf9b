"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with the halves of a head paired."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin ``[tokens, dim]`` in fp32 for integer positions."""
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angle = positions.float()[:, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [tokens, heads, dim]`` by the tables ``[tokens, dim]``; element i pairs with i + dim/2."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.addcmul(x * cos, turned, sin)
