"""Cross entropy over a vocabulary that may be spread over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import Sum, accumulator
from .linear import linear as project
from .table import FLOATS, compiled, op

IGNORE = -100
AT_ONCE = {"cpu": 2**20, "cuda": 2**28, "npu": 2**26, "meta": 2**28}
"""How many logits are made at a time, by kind of device: on a CPU what caches hold, elsewhere what fills the device."""
_WHEN = "more logits than are made at a time, twice"


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


def _many(x: Tensor, weight: Tensor, labels: Tensor) -> bool:
    return len(x) * len(weight) > 2 * AT_ONCE[x.device.type]


def _in_parts(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _InParts.apply(x, weight, labels, accumulator(weight))


for _kind in ("cpu", "meta"):
    linear_cross_entropy.on(_kind, "", when=_WHEN, takes=_many)(_in_parts)
linear_cross_entropy.on("cuda", "torch.compile", when=_WHEN, takes=_many)(_in_parts)
linear_cross_entropy.on(
    "npu",
    "",
    when=f"fp16, bf16, fp32; {_WHEN}",
    takes=lambda x, weight, labels: x.dtype in FLOATS and _many(x, weight, labels),
)(_in_parts)


class _InParts(torch.autograd.Function):
    """Makes the logits of a part of the tokens at a time, in backward again, so that they never exist in full."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, total: Sum | None) -> Tensor:
        ctx.total = total
        ctx.parts = -(-len(x) * len(weight) // AT_ONCE[x.device.type])
        loss_of = _loss_by_width if x.device.type == "cuda" else _loss
        found = [loss_of(part @ weight.T, *rest) for part, *rest in _cut(ctx.parts, x, labels)]
        ctx.save_for_backward(x, weight, labels, torch.cat([normaliser for _, normaliser in found]))
        return torch.stack([loss for loss, _ in found]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels, normaliser = ctx.saved_tensors
        slope_of: Callable[..., Tensor] = _slope_by_width if x.device.type == "cuda" else _slope
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1] and (ctx.total is None or not ctx.total.takes(x.dtype)):
            to_weight = Sum(torch.zeros(weight.shape, dtype=normaliser.dtype, device=x.device))
        for number, (part, *rest) in enumerate(_cut(ctx.parts, x, labels, normaliser)):
            slope = slope_of(part @ weight.T, *rest, grad)
            if to_x is not None:
                torch.mm(slope, weight, out=to_x.chunk(ctx.parts)[number])
            if ctx.needs_input_grad[1]:
                (to_weight or ctx.total).add(slope, part)
        made = None if to_weight is None or to_weight.tensor is None else to_weight.tensor.to(weight.dtype)
        return to_x, made, None, None


def _cut(parts: int, *each: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.chunk(parts) for x in each), strict=True)


def _loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses, and what each token's logits are normalised by."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    mine = labels[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    normaliser = wide.logsumexp(-1)
    return ((normaliser - torch.where(mine, wide, 0).sum(-1)) * (labels != IGNORE)).sum(), normaliser


def _slope(logits: Tensor, labels: Tensor, normaliser: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of ``scale`` times the loss to the logits."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    mine = labels[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    away = (wide - normaliser[:, None]).exp() - mine.to(wide.dtype)
    return (away * (scale * (labels != IGNORE))[:, None]).to(logits.dtype)


_loss_by_width, _slope_by_width = compiled(_loss), compiled(_slope)
