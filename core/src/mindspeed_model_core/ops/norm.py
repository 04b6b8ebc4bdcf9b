"""Normalisations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import FLOATS, op


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


def sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum of ``x^2`` over the last dim, kept with size 1, in fp32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.square().sum(-1, keepdim=True)


def rms_norm_given(x: Tensor, mean_square: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``rms_norm`` of features whose mean square ``[..., 1]`` over all ranks is known."""
    return (x * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return ``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dim, statistics in fp32 or wider."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
