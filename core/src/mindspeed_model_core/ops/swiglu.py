"""Gated activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .table import FLOATS, eager_triton, op


@op
def swiglu(x: Tensor) -> Tensor:
    """Return ``silu(a) * b`` for ``x = [a, b]`` along the last dim (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@swiglu.on("npu", "npu_swiglu npu_swiglu_backward", when="fp16, bf16, fp32", takes=lambda x: x.dtype in FLOATS)
def _npu(x: Tensor) -> Tensor:
    return torch.ops.npu.npu_swiglu(x, dim=-1)  # type: ignore[no-any-return]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from . import kernels

        ctx.save_for_backward(x)
        return kernels.swiglu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from . import kernels

        (x,) = ctx.saved_tensors
        return kernels.swiglu_backward(x, grad.contiguous())


@swiglu.on(
    "cuda",
    "triton",
    when="fp16, bf16, fp32",
    takes=lambda x: x.numel() > 0 and x.shape[-1] % 2 == 0 and eager_triton(x),
)
def _fused(x: Tensor) -> Tensor:
    return _Fused.apply(x.contiguous())


swiglu.compiled_on("cuda")
