"""AdamW: in place, so held step by step against PyTorch's own in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from ..tolerance import assert_close
from .case import draw

SHAPES = ((7, 13), (5,), (0, 3), (2, 3, 4), (257, 300), (1,), (2048,), (6000,), (2, 2500), (30, 70))
"""Of the one before the last, weight and gradient lie off what memory is aligned to; the last is transposed."""
BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.8
STEPS = ((1e-2, False, None), (5e-3, False, 4.0), (1e-2, True, 4.0), (2e-3, False, 1.0))
"""Learning rate of each step, whether it is one that must change nothing, and what divides its gradients."""


def check_adamw_(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Hold ``adamw_`` against ``torch.optim.AdamW``, and that of a skipped step nothing is left."""
    _check("adamw_", device, dtype, bound)


def check_ema_adamw_(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Hold ``ema_adamw_`` against ``torch.optim.AdamW`` and the average's formula."""
    _check("ema_adamw_", device, dtype, bound)


def _check(name: str, device: torch.device, dtype: torch.dtype, bound: float) -> None:
    weights = _placed([draw(*shape).to(device, dtype) for shape in SHAPES])
    moments = [[torch.zeros_like(w) for w in weights] for _ in range(2)]
    averages = [w.to(torch.promote_types(dtype, torch.float32), copy=True) for w in weights]
    learn = [torch.nn.Parameter(w.cpu().to(torch.float64, copy=True)) for w in weights]
    mean = [w.detach().clone() for w in learn]
    inner = torch.optim.AdamW(learn, betas=BETAS, eps=EPS, weight_decay=0.3, foreach=False, fused=False)
    skips = device.type != "npu"
    step = torch.zeros((), device=device)
    for number, (lr, skipped, divisor) in enumerate(STEPS):
        if skipped and not skips:
            continue
        grads = _placed([draw(*shape, seed=number + 1).to(device, dtype) for shape in SHAPES])
        wanted = [g.cpu().double() / (divisor or 1) for g in grads]
        skip, divide = (
            None if value is None else torch.tensor(float(value), device=device)
            for value in (skipped if skips else None, divisor)
        )
        update = ops.Update(step + 1, lr, BETAS, EPS, 0.3, skip, divide)
        if name == "adamw_":
            ops.TABLE[name](weights, grads, *moments, update)
        else:
            ops.TABLE[name](weights, grads, *moments, averages, update, DECAY)
        if not skipped:
            step += 1
            inner.param_groups[0]["lr"] = lr
            for w, g in zip(learn, wanted, strict=True):
                w.grad = g
            inner.step()
        mean = [DECAY * a + (1 - DECAY) * w.detach() for a, w in zip(mean, learn, strict=True)]
    state = [inner.state[w] for w in learn]
    found = {"weight": weights, "first": moments[0], "second": moments[1]}
    want: dict[str, list[Tensor]] = {"weight": [w.detach() for w in learn]}
    want |= {"first": [s["exp_avg"] for s in state], "second": [s["exp_avg_sq"] for s in state]}
    if name == "ema_adamw_":
        found["average"], want["average"] = averages, mean
    assert_close(_named(found), _named(want), bound)


def _placed(tensors: list[Tensor]) -> list[Tensor]:
    *others, off, transposed = tensors
    off = torch.cat((off.new_zeros(1), off.flatten()))[1:].view_as(off)
    return [*others, off, transposed.T.contiguous().T]


def _named(tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {f"{kind} {shape}": t.cpu() for kind, some in tensors.items() for shape, t in zip(SHAPES, some, strict=True)}
