"""Context parallelism by Ulysses (Jacobs et al. 2023, arXiv:2309.14509): ranks share out a sample's tokens.

Everything that works on one token at a time runs on the rank's own tokens. Around self-attention two exchanges turn
"my tokens, all heads" into "all tokens, my heads" and back, so attention itself is that of one device. The number of
tokens need not divide: the first ranks hold one more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share a sample's tokens (dim 0)."""

    group: Any
    rank: int
    size: int

    def shares(self, tokens: int) -> list[int]:
        """Return how many of ``tokens`` each rank holds."""
        return [tokens // self.size + (rank < tokens % self.size) for rank in range(self.size)]

    def share(self, tokens: int) -> tuple[int, int]:
        """Return (start, length) of this rank's tokens."""
        shares = self.shares(tokens)
        return sum(shares[: self.rank]), shares[self.rank]

    def to_heads(self, x: Tensor, tokens: int) -> Tensor:
        """Turn ``[my tokens, ..., heads, width]`` into ``[tokens, ..., my heads, width]``."""
        return _Exchange.apply(x, self, tokens, True)

    def to_tokens(self, x: Tensor, tokens: int) -> Tensor:
        """Turn ``[tokens, ..., my heads, width]`` back into ``[my tokens, ..., heads, width]``."""
        return _Exchange.apply(x, self, tokens, False)

    def gather(self, x: Tensor, tokens: int, shares: list[int] | None = None) -> Tensor:
        """Join all ranks' tokens; every rank then computes the same, so backward keeps this rank's share.

        ``shares`` are how many each rank holds, where they are not those of ``shares()``.
        """
        return gather_tokens(x, self.group, self.shares(tokens) if shares is None else shares)


class ContextShared:
    """Mixed into a module that does something else when ranks share out the tokens; ``heads`` are the uncut ones."""

    cp: ContextParallel | None = None
    heads: int


class _Exchange(torch.autograd.Function):
    """One all-to-all that trades tokens for heads, or back; each is the other's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cp: ContextParallel, tokens: int, to_heads: bool) -> Tensor:
        ctx.cp, ctx.tokens, ctx.to_heads = cp, tokens, to_heads
        return _gather_tokens(x, cp, tokens) if to_heads else _gather_heads(x, cp, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        back = _gather_heads if ctx.to_heads else _gather_tokens
        return back(grad, ctx.cp, ctx.tokens), None, None, None


def _gather_tokens(x: Tensor, cp: ContextParallel, tokens: int) -> Tensor:
    mine, *middle, heads, width = x.shape
    # [ranks, my tokens, ..., their heads, width]: what goes to each rank lies together.
    sent = x.unflatten(-2, (cp.size, heads // cp.size)).movedim(-3, 0).contiguous()
    row = sent[0].numel() // mine
    got = x.new_empty(tokens * row)
    counts = [share * row for share in cp.shares(tokens)]
    dist.all_to_all_single(got, sent.view(-1), counts, [mine * row] * cp.size, group=cp.group)
    return got.view(tokens, *middle, heads // cp.size, width)


def _gather_heads(x: Tensor, cp: ContextParallel, tokens: int) -> Tensor:
    _, *middle, heads, width = x.shape
    mine = cp.share(tokens)[1]
    row = x[0].numel()
    got = x.new_empty(cp.size, mine, *middle, heads, width)
    counts = [share * row for share in cp.shares(tokens)]
    dist.all_to_all_single(got.view(-1), x.contiguous().view(-1), [mine * row] * cp.size, counts, group=cp.group)
    return got.movedim(0, -3).flatten(-3, -2)


def gather_tokens(x: Tensor, group: Any, shares: list[int]) -> Tensor:
    """Join the ranks' tokens along dim 0, ``shares`` of each; backward keeps this rank's own."""
    return _Gather.apply(x, group, shares)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, shares: list[int]) -> Tensor:
        rank = dist.get_rank(group)
        ctx.start, ctx.length = list(itertools.accumulate(shares, initial=0))[rank], shares[rank]
        most = max(shares)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        got = x.new_empty(len(shares), most, *x.shape[1:])
        dist.all_gather_into_tensor(got.view(-1), padded.view(-1), group=group)
        return torch.cat([part[:share] for part, share in zip(got, shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.narrow(0, ctx.start, ctx.length).contiguous(), None, None
