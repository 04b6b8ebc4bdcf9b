"""Normalisation layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.rope import Tables
from ..parallel.placement import Placement
from ..parallel.tensor import TensorParallel


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim with a learned scale.

    With ``unit``, tensor parallelism shares out the features it norms, in blocks of ``unit``; their mean square is
    still that of all.
    """

    tp: TensorParallel | None = None

    def __init__(self, width: int, eps: float, *, unit: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.width, self.eps, self.unit = width, eps, unit

    def placements(self) -> dict[str, Placement]:
        """Return the shares, or a replica whose gradient covers only this rank's tokens in sequence parallelism."""
        if self.unit is not None:
            return {"weight": Placement(0, unit=self.unit)}
        return {"weight": Placement(partial=self.tp is not None and self.tp.sequence)}

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., width]``."""
        if self.tp is None or self.unit is None:
            return ops.rms_norm(x, self.weight, self.eps)
        square = self.tp.sum_features(ops.sum_of_squares(x))
        return ops.rms_norm_given(x, square / self.width, self.weight, self.eps)

    def turned(self, heads: Tensor, tables: Tables) -> Tensor:
        """Normalise ``heads [tokens, batch, heads, width]`` and turn them by these tokens' rotary tables."""
        if self.tp is None or self.unit is None:
            return ops.norm_rope(heads, self.weight, *tables, self.eps)
        return ops.rope_interleaved(self(heads.flatten(-2)).unflatten(-1, heads.shape[-2:]), *tables)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x + residual`` normalised, and the sum; both are ``[..., width]``."""
        if self.tp is None or self.unit is None:
            return ops.add_rms_norm(x, residual, self.weight, self.eps)
        total = x + residual
        return self(total), total


class HeadNorm(RMSNorm):
    """Root-mean-square norm of each head alone, ``[..., heads, width]``, with one learned scale for all of them."""

    def placements(self) -> dict[str, Placement]:
        """Return a replica, whose gradient covers only this rank's heads."""
        return {"weight": Placement(partial=self.tp is not None)}


class LayerNorm(nn.Module):
    """Layer norm over the last dim (Ba et al. 2016, arXiv:1607.06450) with a learned scale and shift.

    ``tokens`` says, as in ``Linear``, whether sequence parallelism shares out the input's tokens.
    """

    tp: TensorParallel | None = None

    def __init__(self, width: int, eps: float = 1e-5, *, tokens: Literal["own", "all"] = "own") -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps, self.tokens = eps, tokens

    def placements(self) -> dict[str, Placement]:
        """Return replicas; with sequence parallelism their gradient covers only this rank's tokens."""
        replica = Placement(partial=self.tp is not None and self.tp.sequence and self.tokens == "own")
        return {"weight": replica, "bias": replica}

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., width]``."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x + residual`` normalised, and the sum; both are ``[..., width]``."""
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)
