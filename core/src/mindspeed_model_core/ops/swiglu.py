"""Gated activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """Return ``silu(a) * b`` for ``x = [a, b]`` along the last dim (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
