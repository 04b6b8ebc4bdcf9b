"""Cross entropy over a vocabulary that may be spread over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .linear import accumulate_product_, accumulator
from .linear import linear as project
from .table import FLOATS, compiled, op

IGNORE = -100
AT_ONCE = {"cpu": 2**20, "cuda": 2**26, "npu": 2**26, "meta": 2**26}
"""How many logits exist at a time, by kind of device: on a CPU what caches hold, elsewhere what fills the device."""


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


@op
def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of ``cross_entropy(x W^T, labels)`` over the tokens, in fp32 (fp64 for fp64).

    ``x`` is ``[tokens, width]``, ``weight`` ``[vocab, width]``.
    """
    return cross_entropy(project(x, weight), labels).sum()


def _in_parts(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _InParts.apply(x, weight, labels, accumulator(weight))


for _kind in ("cpu", "meta"):
    linear_cross_entropy.on(_kind, "")(_in_parts)
linear_cross_entropy.on("cuda", "torch.compile")(_in_parts)
linear_cross_entropy.on("npu", "", when="fp16, bf16, fp32", takes=lambda x, *_: x.dtype in FLOATS)(_in_parts)


class _InParts(torch.autograd.Function):
    """Computes gradients with the loss, a part of the tokens after the other, so that no logits are kept.

    A sum has one gradient for all its terms: backward scales what is there. (Hsu et al. 2024, Liger Kernel,
    arXiv:2410.10989, has the idea.)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, total: Tensor | None) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = max(1, AT_ONCE[x.device.type] // len(weight))
        once = 0 < len(x) <= rows and (total is None or total.dtype == weight.dtype)
        value = torch.zeros((), dtype=wide, device=x.device)
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1] and not once:
            to_weight = torch.zeros(weight.shape, dtype=wide, device=x.device)
        part_of = _part_by_width if x.device.type == "cuda" else _part
        for at in range(0, len(x), rows):
            part = x[at : at + rows]
            loss, grad = part_of(part @ weight.T, labels[at : at + rows])
            value += loss
            if to_x is not None:
                torch.mm(grad, weight, out=to_x[at : at + rows])
            if to_weight is not None:
                accumulate_product_(to_weight, grad, part)
            elif ctx.needs_input_grad[1]:
                to_weight = grad.T @ part
        ctx.total, ctx.dtype = total, weight.dtype
        ctx.save_for_backward(to_x, to_weight)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        to_x, to_weight = ctx.saved_tensors
        if to_x is not None:
            to_x = to_x * grad.to(to_x.dtype)
        if to_weight is not None and ctx.total is not None:
            ctx.total.addcmul_(to_weight, grad)
            to_weight = None
        elif to_weight is not None:
            to_weight = torch.mul(to_weight, grad, out=torch.empty_like(to_weight, dtype=ctx.dtype))
        return to_x, to_weight, None, None


def _part(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of losses and its gradient to the logits, which are overwritten."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    kept = labels != IGNORE
    labels = labels.clamp_min(0)[:, None]
    normaliser = wide.logsumexp(-1)
    loss = ((normaliser - wide.gather(-1, labels)[:, 0]) * kept).sum()
    grad = wide.sub_(normaliser[:, None]).exp_()
    grad.scatter_add_(-1, labels, -torch.ones_like(labels, dtype=grad.dtype))
    return loss, grad.mul_(kept[:, None]).to(logits.dtype)


def _pure_part(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as formulas that compile into passes over the logits."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    kept = labels != IGNORE
    mine = labels[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    normaliser = wide.logsumexp(-1)
    loss = ((normaliser - torch.where(mine, wide, 0).sum(-1)) * kept).sum()
    grad = ((wide - normaliser[:, None]).exp() - mine.to(wide.dtype)) * kept[:, None]
    return loss, grad.to(logits.dtype)


_part_by_width = compiled(_pure_part)
