"""Normalisations, alone and of a sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .table import FLOATS, eager_triton, op

Pair = tuple[Tensor, Tensor]


@op
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dim (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


@rms_norm.on(
    "npu",
    "npu_rms_norm npu_rms_norm_backward",
    when="fp16, bf16, fp32; scale of the same type",
    takes=lambda x, weight, eps: x.dtype in FLOATS and weight.dtype == x.dtype,
)
def _npu_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]  # type: ignore[no-any-return]


rms_norm.compiled_on("cuda")


@op
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Pair:
    """Return ``rms_norm(x + residual)`` and the sum; both terms have one shape."""
    total = x + residual
    return rms_norm.reference(total, weight, eps), total


class _AddRMSNorm(torch.autograd.Function):
    """torch_npu has no derivative of its sum and norm; that of the norm, from what both keep, is its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Pair:
        normed, rstd, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight, epsilon=eps)
        ctx.save_for_backward(total, weight, rstd)
        return normed, total

    @staticmethod
    def backward(ctx: Any, grad_normed: Tensor, grad_total: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight, rstd = ctx.saved_tensors
        grad, grad_weight = torch.ops.npu.npu_rms_norm_backward(grad_normed, total, weight, rstd)
        grad = grad + grad_total
        return grad, grad, grad_weight.to(weight.dtype), None


@add_rms_norm.on(
    "npu",
    "npu_add_rms_norm npu_rms_norm_backward",
    when="fp16, bf16, fp32; terms and scale of the same type",
    takes=lambda x, residual, weight, eps: (
        x.dtype in FLOATS and weight.dtype == x.dtype == residual.dtype and residual.shape == x.shape
    ),
)
def _npu_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Pair:
    return _AddRMSNorm.apply(x, residual, weight, eps)


add_rms_norm.compiled_on("cuda")


@op
def sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum of ``x^2`` over the last dim, kept with size 1, in fp32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.square().sum(-1, keepdim=True)


sum_of_squares.compiled_on("cuda")


@op
def rms_norm_given(x: Tensor, mean_square: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``rms_norm`` of features whose mean square ``[..., 1]`` over all ranks is known."""
    return (x * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight


rms_norm_given.compiled_on("cuda")


@op
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return ``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dim, statistics in fp32 or wider."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


class FusedLayerNorm(torch.autograd.Function):
    """Layer norm, times ``one + scale``, plus ``shift``; both are ``[width]``, or as the last dims of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, one: float) -> Tensor:
        from . import kernels

        out, x, kept = kernels.layer_norm(x.contiguous(), scale, shift, eps, one)
        ctx.save_for_backward(x, scale, kept)
        ctx.one = one
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from . import kernels

        x, scale, kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = kernels.layer_norm_backward(x, scale, kept, grad.contiguous(), ctx.one, needs)
        return *grads, None, None


FUSED_WIDTH = "at most 16 KiB a row"


def fuses_layer_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> bool:
    """Whether ``FusedLayerNorm`` takes these operands; whether their shapes fit is the caller's to see."""
    takes_rows = eager_triton(x) and x.numel() > 0 and x.shape[-1] * x.element_size() <= 2**14
    if not takes_rows or scale is None or shift is None:
        return takes_rows and scale is shift
    alike = scale.dtype == shift.dtype and scale.shape == shift.shape
    return alike and scale.dtype in FLOATS and scale.stride(-1) == shift.stride(-1) == 1


@layer_norm.on(
    "cuda",
    "triton",
    when=f"fp16, bf16, fp32; scale and shift of the same type, or neither; {FUSED_WIDTH}",
    takes=lambda x, weight, bias, eps: (
        fuses_layer_norm(x, weight, bias) and (weight is None or weight.dtype == x.dtype)
    ),
)
def _fused_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return FusedLayerNorm.apply(x, weight, bias, eps, 0.0)  # type: ignore[no-any-return]


layer_norm.compiled_on("cuda")  # torch_npu serves the reference by one kernel


@op
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float = 0.0,
    training: bool = False,
) -> Pair:
    """Return ``layer_norm(dropout(x) + residual)`` and the sum; both terms have one shape.

    ``dropout`` is the share of ``x`` that becomes zero in ``training``, by the device's generator.
    """
    total = _dropped(x, dropout, training) + residual
    return layer_norm.reference(total, weight, bias, eps), total


class _FusedAddLayerNorm(torch.autograd.Function):
    """Layer norm of a sum, and the sum, either of which may be left unused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Pair:
        from . import kernels

        normed, total, kept = kernels.layer_norm(x.contiguous(), weight, bias, eps, 0.0, residual.contiguous())
        ctx.save_for_backward(total, weight, kept)
        ctx.set_materialize_grads(False)
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_normed: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        from . import kernels

        if grad_normed is None:
            return grad_total, grad_total, None, None, None
        total, weight, kept = ctx.saved_tensors
        needs_x, needs_residual, *needs_sums = ctx.needs_input_grad[:4]
        needs = (needs_x or needs_residual, *needs_sums)
        grad_total = None if grad_total is None else grad_total.contiguous()
        grad, *sums = kernels.layer_norm_backward(total, weight, kept, grad_normed.contiguous(), 0.0, needs, grad_total)
        return grad, grad, *sums, None


def _dropped(x: Tensor, dropout: float, training: bool) -> Tensor:
    return F.dropout(x, dropout) if training and dropout > 0 else x


@add_layer_norm.on(
    "npu",
    "npu_add_layer_norm npu_add_layer_norm_backward",
    when="fp16, bf16, fp32; terms, scale and shift of the same type",
    takes=lambda x, residual, weight, bias, eps, dropout=0.0, training=False: (
        x.dtype in FLOATS and weight.dtype == bias.dtype == x.dtype == residual.dtype and residual.shape == x.shape
    ),
)
def _npu_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float = 0.0,
    training: bool = False,
) -> Pair:
    dropped = _dropped(x, dropout, training)
    normed, _, _, total = torch.ops.npu.npu_add_layer_norm(dropped, residual, weight, bias, eps, True)
    return normed, total


@add_layer_norm.on(
    "cuda",
    "triton",
    when=f"fp16, bf16, fp32; terms, scale and shift of the same type, nothing dropped; {FUSED_WIDTH}",
    takes=lambda x, residual, weight, bias, eps, dropout=0.0, training=False: (
        fuses_layer_norm(x, weight, bias)
        and weight.dtype == x.dtype == residual.dtype
        and residual.shape == x.shape
        and not (training and dropout > 0)
    ),
)
def _fused_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: float = 0.0,
    training: bool = False,
) -> Pair:
    return _FusedAddLayerNorm.apply(x, residual, weight, bias, eps)  # type: ignore[no-any-return]


add_layer_norm.compiled_on("cuda")
