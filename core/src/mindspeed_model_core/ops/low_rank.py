"""Linear maps of frozen weights with what adapters add to them (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .keep import keeps
from .linear import PRODUCTS, product, rows
from .table import FLOATS, op

Places = tuple[tuple[int, int], ...]
"""Columns of an output: the first, and how many."""


def add_low_rank(y: Tensor, low: Tensor, b: Tensor, places: Places) -> Tensor:
    """Return ``y [..., out]`` with ``low_i b_i^T`` added in each of ``places``, which are in order.

    ``low [..., places * rank]`` holds the ``low_i`` side by side, ``b [columns of all places, rank]`` the ``b_i`` one
    below the other.
    """
    parts, at = [], 0
    for (first, count), z, factor in _pairs(low, b, places):
        if first > at:
            parts.append(low.new_zeros(*low.shape[:-1], first - at))
        parts.append(F.linear(z, factor))
        at = first + count
    if at < y.shape[-1]:
        parts.append(low.new_zeros(*low.shape[:-1], y.shape[-1] - at))
    return y + torch.cat(parts, -1)


def _pairs(low: Tensor, b: Tensor, places: Places) -> Any:
    return zip(places, low.split(b.shape[1], -1), b.split([count for _, count in places]), strict=True)


@op
def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, b: Tensor, places: Places) -> Tensor:
    """Return ``x W^T + bias`` with the update of ``add_low_rank``."""
    return add_low_rank(F.linear(x, weight, bias), low, b, places)


class _Adapted(torch.autograd.Function):
    """Adds the updates in the products that make them, to columns of the output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, b: Tensor, places: Places
    ) -> Tensor:
        ctx.places = places
        ctx.save_for_backward(weight, low, b)
        y = product(x, weight, bias)
        y = y.clone() if keeps(PRODUCTS) else y  # what is kept of a product may not change
        flat = y.view(low.shape[:-1].numel(), y.shape[-1])
        for (first, count), z, factor in _pairs(rows(low), b, places):
            flat[:, first : first + count].addmm_(z, factor.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, low, b = ctx.saved_tensors
        flat = rows(grad)
        to_low, to_b = low.new_empty(len(flat), low.shape[-1]), torch.empty_like(b)
        given, made = _pairs(rows(low), b, ctx.places), _pairs(to_low, to_b, ctx.places)
        for ((first, count), z, factor), (_, to_z, to_factor) in zip(given, made, strict=True):
            mine = flat[:, first : first + count]
            torch.mm(mine, factor, out=to_z)
            torch.mm(mine.T, z, out=to_factor)
        to_x = (flat @ weight).view(*grad.shape[:-1], weight.shape[1]) if ctx.needs_input_grad[0] else None
        return to_x, None, None, to_low.view(low.shape), to_b, None


def _frozen(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, b: Tensor, places: Places) -> bool:
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    alike = x.dtype == weight.dtype == low.dtype == b.dtype
    return alike and not (learns or torch.compiler.is_compiling())


_WHEN = "all of one type; the weights are frozen"
for _kind in ("cuda", "meta"):  # on a CPU, sums into columns of something wider are slow
    adapted_linear.on(_kind, "", when=_WHEN, takes=_frozen)(_Adapted.apply)
adapted_linear.on(
    "npu", "", when=f"fp16, bf16, fp32; {_WHEN}", takes=lambda x, *rest: x.dtype in FLOATS and _frozen(x, *rest)
)(_Adapted.apply)
