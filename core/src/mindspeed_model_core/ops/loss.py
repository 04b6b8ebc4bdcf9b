"""Cross entropy over a vocabulary that may be spread over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .table import compiled, op

IGNORE = -100


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits and one number a token for backward, not the probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, start: int, group: Any) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        top = wide.amax(-1)
        if group is not None:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        total = (wide - top[:, None]).exp_().sum(-1)
        local = labels - start
        mine = (local >= 0) & (local < logits.shape[-1])
        target = wide.gather(-1, local.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0] * mine
        if group is not None:
            both = torch.stack((total, target))
            dist.all_reduce(both, group=group)
            total, target = both
        normaliser = top + total.log()
        ctx.save_for_backward(logits, normaliser, labels)
        ctx.start = start
        return (normaliser - target) * (labels != IGNORE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, normaliser, labels = ctx.saved_tensors
        wide = logits if logits.dtype == torch.float64 else logits.float()
        out = (wide - normaliser[:, None]).exp_()
        local = labels - ctx.start
        mine = (local >= 0) & (local < logits.shape[-1])
        out.scatter_add_(-1, local.clamp(0, logits.shape[-1] - 1)[:, None], -mine[:, None].to(out.dtype))
        out *= (grad * (labels != IGNORE))[:, None]
        return out.to(logits.dtype), None, None, None


@op
def cross_entropy(logits: Tensor, labels: Tensor, *, start: int = 0, group: Any = None) -> Tensor:
    """Return ``-log softmax(logits)[label]`` per token in fp32 (fp64 for fp64 logits), 0 where the label is -100.

    ``logits`` is ``[tokens, vocab]``, or this rank's slice of the vocabulary beginning at ``start`` with ``group`` the
    ranks that hold the rest. ``labels`` is int64 ``[tokens]``.
    """
    return _CrossEntropy.apply(logits, labels, start, group)


def _direct(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss as a formula that compiles into passes over the logits, with nothing of their size kept."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # A comparison, because the derivative of an index would be written to memory by itself.
    mine = labels[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    target = torch.where(mine, wide, 0).sum(-1)
    return (wide.logsumexp(-1) - target) * (labels != IGNORE)


_by_width = compiled(_direct)


# torch_npu's fused loss is none for this: it is in the logits' type, keeps all probabilities, and knows no ranks.
@cross_entropy.on(
    "cuda",
    "torch.compile",
    when="all of the vocabulary on one rank",
    takes=lambda logits, labels, *, start=0, group=None: start == 0 and group is None,
)
def _fused(logits: Tensor, labels: Tensor, *, start: int = 0, group: Any = None) -> Tensor:
    return _by_width(logits, labels)
