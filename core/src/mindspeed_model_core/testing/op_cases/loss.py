"""Cross entropy, with positions that are ignored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ... import ops
from ...ops import loss
from ..tolerance import assert_close
from .case import Case, draw


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    labels = labels.cpu()
    kept = labels != -100
    chance = logits.softmax(-1)[torch.arange(len(labels)), labels.clamp_min(0)]
    return torch.where(kept, -chance.log(), 0)


def _labels(tokens: int, vocabulary: int) -> Tensor:
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens))
    labels[::7] = -100
    return labels


def _linear_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _loss(x @ weight.T, labels).sum()


CASES = (
    *(
        Case(ops.cross_entropy, f"{n}x{vocabulary}", (draw(n, vocabulary),), _loss, (_labels(n, vocabulary),))
        for n, vocabulary in ((70, 96), (13, 1001), (1, 5), (8, 2), (0, 8))
    ),
    *(
        Case(
            ops.linear_cross_entropy,
            f"{n}x16, {vocabulary}",
            (draw(n, 16), draw(vocabulary, 16, seed=1)),
            _linear_loss,
            (_labels(n, vocabulary),),
            reference_on=("cpu", "cuda", "npu"),
        )
        for n, vocabulary in ((70, 96), (1, 5), (13, 1003), (0, 8), (0, 61))
    ),
)


def check_linear_cross_entropy(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Hold the loss against the formula, of vocabularies that 8 divides and that it does not, in parts and at once."""
    for vocabulary in (40, 61):
        for parts in (5, 1):
            check_sums(ops.linear_cross_entropy, vocabulary, parts, device, dtype, bound)


def check_sums(
    function: Callable[..., Tensor], vocabulary: int, parts: int, device: torch.device, dtype: torch.dtype, bound: float
) -> None:
    """Hold what serves ``ops.linear_cross_entropy`` against the formula, by its gradients' size too.

    Logits are made in so many parts. Gradients are handed on, or added up: to nothing, to a sum of the weight's type,
    to one in fp32.
    """
    x, weight = (draw(*shape).to(device, dtype) for shape in ((61, 16), (vocabulary, 16)))
    labels = _labels(61, vocabulary).to(device)
    wide_x, wide_weight = (t.cpu().double().clone().requires_grad_() for t in (x, weight))
    want = _linear_loss(wide_x, wide_weight, labels) / 4080
    to_x, to_weight = torch.autograd.grad(want, (wide_x, wide_weight))
    before, loss.AT_ONCE[device.type] = loss.AT_ONCE[device.type], -(-61 * vocabulary // parts)
    try:
        for total in (None, dtype, torch.promote_types(dtype, torch.float32)):
            here, learnt = x.clone().requires_grad_(), weight.clone().requires_grad_()
            summed = None if total is None else torch.zeros_like(learnt, dtype=total)
            ops.accumulate_gradient(learnt, summed)
            value = function(here, learnt, labels)
            assert value.dtype == torch.promote_types(dtype, torch.float32)
            (value / 4080).backward()
            assert ops.level() == 0 or (learnt.grad is None) == (summed is not None)
            made = {"x": here.grad, "weight": summed if learnt.grad is None else learnt.grad, "value": value / 4080}
            found = {name: t.detach().cpu().double() for name, t in made.items() if t is not None}
            assert_close(found, {"value": want.detach(), "x": to_x, "weight": to_weight}, bound)
            # One rounding of the scale would be an error of 4e-3 that all elements share.
            share = found["x"].norm() / to_x.norm()
            assert abs(float(share) - 1) < 2e-3
    finally:
        loss.AT_ONCE[device.type] = before
