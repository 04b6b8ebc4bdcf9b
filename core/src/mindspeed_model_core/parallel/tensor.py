"""Tensor parallelism as layers see it: what to do at the edges of a region whose features are shared out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..errors import UserError
from . import engine
from .context import gather_tokens


def even_share(tokens: int, ranks: int) -> int:
    """Return the tokens of each of ``ranks``; UserError unless sequence parallelism can share them evenly."""
    if tokens % ranks:
        raise UserError(
            f"parallel.sequence=true: {ranks} tensor-parallel ranks cannot share {tokens} tokens evenly; set "
            f"parallel.sequence=false, or choose sizes with a multiple of {ranks} tokens"
        )
    return tokens // ranks


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share a layer. With ``sequence``, activations between regions are shared out by token (dim 0).

    Products are cut into ``chunks`` that overlap with their collectives, where nothing fused overlaps them.
    """

    group: Any
    rank: int
    size: int
    sequence: bool = False
    chunks: int = 1

    def column(self, x: Tensor, weight: Tensor, bias: Tensor | None, sequence: bool) -> Tensor:
        """Apply this rank's output features to all tokens; with ``sequence`` ``x`` is this rank's share of them."""
        product = ops.all_gather_matmul if sequence else ops.column_matmul
        return product(x, weight, bias, self.group, chunks=self.chunks)

    def enter(self, x: Tensor, sequence: bool) -> Tensor:
        """Give all tokens to features that are shared out; backward adds up their gradients over ranks."""
        return engine.enter(x, sequence)

    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None, sequence: bool) -> Tensor:
        """Apply this rank's input features and add up over ranks; the bias is added once."""
        product = ops.matmul_reduce_scatter if sequence else ops.matmul_all_reduce
        y = product(x, weight, self.group, chunks=self.chunks)
        return y if bias is None else y + bias

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Look tokens up in a table whose rows are shared out."""
        local = tokens - self.rank * weight.shape[0]
        mine = (local >= 0) & (local < weight.shape[0])
        found = F.embedding(local.clamp(0, weight.shape[0] - 1), weight) * mine[:, None]
        return engine.reduce(found, self.sequence)

    def sum_features(self, x: Tensor) -> Tensor:
        """Add up a statistic of features that are shared out."""
        return engine.sum_over_features(x)

    def own_tokens(self, x: Tensor) -> Tensor:
        """Return this rank's share of the tokens (dim 0) of a tensor that wants no gradient."""
        if not self.sequence:
            return x
        share = even_share(len(x), self.size)
        return x.narrow(0, self.rank * share, share)

    def all_tokens(self, x: Tensor) -> Tensor:
        """Join the ranks' shares of the tokens; every rank then computes the same."""
        return gather_tokens(x, self.group, [len(x)] * self.size) if self.sequence else x

    def gather(self, x: Tensor) -> Tensor:
        """Join the ranks' features along the last dim."""
        return engine.gather_features(x)
