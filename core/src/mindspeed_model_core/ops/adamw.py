"""AdamW's update, in place over lists of tensors of one type on one device, alone or with a moving average."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from operator import not_

import torch
from torch import Tensor

from .table import FLOATS, eager_triton, op

Tensors = list[Tensor]


@dataclass(frozen=True)
class Update:
    """Which update it is, and what of.

    ``step`` counts the updates, this one among them: a tensor without dims on the device. Where ``skip``, another, is
    1, weights and moments stay as they are. Gradients count as divided by ``divisor``, one more, and may be left so.
    """

    step: Tensor
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    skip: Tensor | None = None
    divisor: Tensor | None = None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@op
@torch.no_grad()
def adamw_(weights: Tensors, grads: Tensors, firsts: Tensors, seconds: Tensors, update: Update) -> None:
    """Update weights and both moments by their gradients (Loshchilov and Hutter 2019, arXiv:1711.05101).

    The step of a weight is ``lr * (m / (sqrt(v) + eps) + weight_decay * weight)``, ``m`` and ``v`` the moments over
    ``1 - beta ** step``.
    """
    (low, high), step = update.betas, update.step.double()  # in fp32 a power near 1 loses its distance to it
    for weight, grad, first, second in zip(weights, grads, firsts, seconds, strict=True):
        w, g, m, v = (_wide(x) for x in (weight, grad, first, second))
        g = g if update.divisor is None else g / update.divisor.to(g.dtype)
        m, v = low * m + (1 - low) * g, high * v + (1 - high) * g * g
        mean, square = m / (1 - low**step).to(m.dtype), v / (1 - high**step).to(v.dtype)
        w = w - update.lr * (mean / (square.sqrt() + update.eps) + update.weight_decay * w)
        for held, new in ((weight, w), (first, m), (second, v)):
            held.copy_(new if update.skip is None else torch.where(update.skip == 1, _wide(held), new))


def _fused_takes(weights: Tensors, grads: Tensors, firsts: Tensors, seconds: Tensors, *_: object) -> bool:
    return all(t.dtype == weights[0].dtype for t in (*weights, *grads, *firsts, *seconds))


def _npu_takes(weights: Tensors, grads: Tensors, firsts: Tensors, seconds: Tensors, update: Update) -> bool:
    # Whether its kernel heeds a skip is not known.
    return weights[0].dtype in FLOATS and update.skip is None and _fused_takes(weights, grads, firsts, seconds)


@torch.no_grad()
def _torch_adamw_(weights: Tensors, grads: Tensors, firsts: Tensors, seconds: Tensors, update: Update) -> None:
    (low, high), steps, divisor = update.betas, [update.step] * len(weights), update.divisor
    if divisor is not None and not _divides(grads):
        torch._foreach_mul_(grads, 1 / divisor)
        divisor = None
    torch._fused_adamw_(
        weights, grads, firsts, seconds, [], steps, lr=update.lr, beta1=low, beta2=high, eps=update.eps,
        weight_decay=update.weight_decay, amsgrad=False, maximize=False, grad_scale=divisor, found_inf=update.skip,
    )  # fmt: skip


def _divides(grads: Tensors) -> bool:
    """Whether the kernel divides gradients itself; elsewhere it would by a number rounded to fp32, or is not known."""
    return grads[0].device.type == "cuda" and grads[0].dtype != torch.float64


@torch.no_grad()
def _triton_adamw_(weights: Tensors, grads: Tensors, firsts: Tensors, seconds: Tensors, update: Update) -> None:
    from . import kernels

    (low, high), step = update.betas, update.step.double()
    no = torch.zeros((), device=step.device)
    given = [no + 1 if update.divisor is None else update.divisor, no if update.skip is None else update.skip]
    told = torch.stack([t.float() for t in (1 - low**step, 1 - high**step, *given)])
    operands = weights, grads, firsts, seconds
    whole = [*map(all, zip(*(map(Tensor.is_contiguous, some) for some in operands), strict=True))]
    if any(whole):
        w, g, m, v = (list(compress(some, whole)) for some in operands)
        kernels.adamw_(
            w, g, m, v, told, lr=update.lr, betas=update.betas, eps=update.eps, weight_decay=update.weight_decay
        )
    if not all(whole):
        w, g, m, v = (list(compress(some, map(not_, whole))) for some in operands)
        _torch_adamw_(w, g, m, v, update)


adamw_.on(
    "cuda",
    "triton _fused_adamw_",
    when="fp16, bf16, fp32, all of one type",
    takes=lambda weights, grads, firsts, seconds, update: eager_triton(*weights, *grads, *firsts, *seconds),
)(_triton_adamw_)
for _kind in ("cuda", "cpu"):
    adamw_.on(_kind, "_fused_adamw_", when="all of one type", takes=_fused_takes)(_torch_adamw_)
# Not npu_apply_adam_w: it is given its numbers in the gradient's type, and in bf16 a beta of 0.999 is 1.
adamw_.on("npu", "_fused_adamw_", when="fp16, bf16, fp32, all of one type; no skip", takes=_npu_takes)(_torch_adamw_)


@op
@torch.no_grad()
def ema_adamw_(
    weights: Tensors,
    grads: Tensors,
    firsts: Tensors,
    seconds: Tensors,
    averages: Tensors,
    update: Update,
    decay: float,
) -> None:
    """Do ``adamw_``, then ``average = decay * average + (1 - decay) * weight``; averages may be of a wider type."""
    adamw_.reference(weights, grads, firsts, seconds, update)
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight.to(average.dtype), 1 - decay)


@torch.no_grad()
def _ema_adamw_(
    weights: Tensors,
    grads: Tensors,
    firsts: Tensors,
    seconds: Tensors,
    averages: Tensors,
    update: Update,
    decay: float,
) -> None:
    """Update with what serves ``adamw_``; then all averages move at once."""
    adamw_(weights, grads, firsts, seconds, update)
    new = [weight.to(average.dtype) for weight, average in zip(weights, averages, strict=True)]
    torch._foreach_lerp_(averages, new, 1 - decay)


for _kind in ("cuda", "cpu"):
    ema_adamw_.on(_kind, "_fused_adamw_ _foreach_lerp_", when="all but averages of one type", takes=_fused_takes)(
        _ema_adamw_
    )
ema_adamw_.on(
    "npu",
    "_fused_adamw_ _foreach_lerp_",
    when="fp16, bf16, fp32, all but averages of one type; no skip",
    takes=lambda weights, grads, firsts, seconds, averages, update, decay: _npu_takes(
        weights, grads, firsts, seconds, update
    ),
)(_ema_adamw_)
