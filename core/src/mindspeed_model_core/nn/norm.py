"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..parallel.placement import Placement
from ..parallel.tensor import TensorParallel


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim with a learned scale."""

    tp: TensorParallel | None = None

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def placements(self) -> dict[str, Placement]:
        """Return a replica; with sequence parallelism its gradient covers only this rank's tokens."""
        return {"weight": Placement(partial=self.tp is not None and self.tp.sequence)}

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., width]``."""
        return ops.rms_norm(x, self.weight, self.eps)
