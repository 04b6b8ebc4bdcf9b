"""Cross entropy over a vocabulary that may be spread over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .linear import HALVES, Sum, accumulator, weight_gradient
from .linear import linear as project
from .table import FLOATS, compiled, op

IGNORE = -100
AT_ONCE = {"cpu": 2**20, "cuda": 2**28, "npu": 2**26, "meta": 2**28}
"""How many logits are made at a time, by kind of device: on a CPU what caches hold, elsewhere what fills the device."""
_PADDED = 64
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


def _unaligned(x: Tensor, weight: Tensor, labels: Tensor) -> bool:
    """Whether rows of logits would not all begin at a multiple of 16 bytes."""
    return x.dtype in HALVES and len(weight) % 8 > 0


# Unaligned, cuBLAS takes a kernel of older devices: on an H200 each of the three products is 2.5 times as long.
@linear_cross_entropy.on("cuda", "torch.compile", when="fp16, bf16; a vocabulary no multiple of 8", takes=_unaligned)
def _padded(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _LinearCrossEntropy.apply(x, weight, labels, accumulator(weight), True)


def _in_parts(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _LinearCrossEntropy.apply(x, weight, labels, accumulator(weight), False)


for _kind in ("cpu", "meta"):
    linear_cross_entropy.on(_kind, "", when=_WHEN, takes=_many)(_in_parts)
linear_cross_entropy.on("cuda", "torch.compile", when=_WHEN, takes=_many)(_in_parts)
linear_cross_entropy.on(
    "npu",
    "",
    when=f"fp16, bf16, fp32; {_WHEN}",
    takes=lambda x, weight, labels: x.dtype in FLOATS and _many(x, weight, labels),
)(_in_parts)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes many logits for a part of the tokens at a time, in backward again, so that they never exist in full.

    Fewer are made at once and kept. With ``pad`` the products are of a vocabulary that ``_PADDED`` divides, its last
    entries of weight zero and no part of the loss.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, total: Sum | None, pad: bool) -> Tensor:
        many = _many(x, weight, labels)
        ctx.total, ctx.vocab, ctx.pad = total, len(weight), pad
        ctx.parts = -(-len(x) * len(weight) // AT_ONCE[x.device.type]) if many else 1
        if pad:
            weight = torch.cat((weight, weight.new_zeros(-len(weight) % _PADDED, weight.shape[1])))
        kept = None if many else _logits(x, weight, ctx.vocab)
        loss_of = _loss_by_width if x.device.type == "cuda" else _loss
        found = [
            loss_of(_logits(part, weight, ctx.vocab) if kept is None else kept, *rest)
            for part, *rest in _cut(ctx.parts, x, labels)
        ]
        ctx.save_for_backward(x, weight, labels, torch.cat([normaliser for _, normaliser in found]), kept)
        return torch.stack([loss for loss, _ in found]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels, normaliser, kept = ctx.saved_tensors
        slope_of: Callable[..., Tensor] = _slope_by_width if x.device.type == "cuda" else _slope
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_weight, total = None, ctx.total
        if kept is None and ctx.needs_input_grad[1] and (total is None or not total.takes(x.dtype)):
            to_weight = torch.zeros(weight.shape, dtype=normaliser.dtype, device=x.device)
            total = Sum(to_weight)
        for number, (part, *rest) in enumerate(_cut(ctx.parts, x, labels, normaliser)):
            logits = _logits(part, weight, ctx.vocab) if kept is None else kept
            slope = slope_of(logits, *rest, grad, ctx.pad)
            del logits  # before there are more
            if to_x is not None:
                torch.mm(slope, weight, out=to_x.chunk(ctx.parts)[number])
            if ctx.needs_input_grad[1]:
                made = weight_gradient(total, slope, part)
                to_weight = to_weight if made is None else made
        return to_x, None if to_weight is None else to_weight[: ctx.vocab].to(weight.dtype), None, None, None


def _logits(x: Tensor, weight: Tensor, vocab: int) -> Tensor:
    return (x @ weight.T)[:, :vocab]


def _cut(parts: int, *each: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.chunk(parts) for x in each), strict=True)


def _loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses, and what each token's logits are normalised by."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    mine = labels[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    normaliser = wide.logsumexp(-1)
    return ((normaliser - torch.where(mine, wide, 0).sum(-1)) * (labels != IGNORE)).sum(), normaliser


def _slope(logits: Tensor, labels: Tensor, normaliser: Tensor, scale: Tensor, pad: bool) -> Tensor:
    """Return the gradient of ``scale`` times the loss to the logits, and zeros to what ``pad`` adds to them."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    mine = labels[:, None] == torch.arange(logits.shape[-1], device=logits.device)
    away = (wide - normaliser[:, None]).exp() - mine.to(wide.dtype)
    slope = (away * (scale * (labels != IGNORE))[:, None]).to(logits.dtype)
    return F.pad(slope, (0, -slope.shape[-1] % _PADDED)) if pad else slope


_loss_by_width, _slope_by_width = compiled(_loss), compiled(_slope)
