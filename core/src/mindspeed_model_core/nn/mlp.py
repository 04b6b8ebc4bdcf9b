"""Feed-forward layers."""

from __future__ import annotations

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
