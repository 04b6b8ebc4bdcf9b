"""Feed-forward layers."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .linear import Linear


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with gate and up in one projection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden, bias=False, split="out", parts=(hidden, hidden))
        self.down = Linear(hidden, width, bias=False, split="in")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[tokens, width]`` to the same shape."""
        return self.down(ops.swiglu(self.gate_up(x)))


class FeedForward(nn.Module):
    """``down(gelu(up(x)))`` with biases; ``gelu`` as its tanh approximation or, with ``none``, exact."""

    def __init__(self, width: int, hidden: int, *, approximate: Literal["tanh", "none"] = "tanh") -> None:
        super().__init__()
        self.up = Linear(width, hidden, split="out")
        self.down = Linear(hidden, width, split="in")
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[tokens, ..., width]`` to the same shape."""
        return self.down(F.gelu(self.up(x), approximate=self.approximate))
