"""Linear layers, and products added up in a wider type than that of their operands."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import eager_triton, level, op

HALVES = (torch.float16, torch.bfloat16)
_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
_TOTAL = "accumulator"
PRODUCTS = frozenset("aten::mm aten::addmm aten::linear".split())
"""The operators, as the dispatcher names them, that layers' products run by; the last where a device has it whole."""


@op
def accumulate_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add ``a^T b`` to ``total [out, in]`` in place and return it; ``a [tokens, out]``, ``b [tokens, in]``.

    Products and sums are in the type of ``total``: nothing is rounded to the operands' on the way.
    """
    return total.addmm_(a.T.to(total.dtype), b.to(total.dtype))


def _widens(total: Tensor, a: Tensor, b: Tensor) -> bool:
    return total.dtype == torch.float32 and a.dtype == b.dtype and a.dtype in HALVES and total.is_contiguous()


@accumulate_product_.on(
    "npu",
    "npu_grouped_matmul_add_",
    when="fp16 or bf16 into fp32; widths below 65536; not empty",
    takes=lambda total, a, b: _widens(total, a, b) and len(a) > 0 and 0 < min(total.shape) <= max(total.shape) < 65536,
)
def _npu(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    ends = torch.full((1,), len(a), dtype=torch.int64, device=a.device)
    torch.ops.npu.npu_grouped_matmul_add_(total[None], a, b, ends)
    return total


@accumulate_product_.on(
    "cuda",
    "addmm.dtype_out",
    when="fp16 or bf16 into fp32; PyTorch from 2.10",  # before, it wanted a sum of the operands' type
    takes=lambda total, a, b: _widens(total, a, b) and _TORCH >= (2, 10),
)
def _cuda(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.aten.addmm.dtype_out(total, a.T, b, torch.float32, out=total)  # type: ignore[no-any-return]


@accumulate_product_.on(
    "cuda",
    "mm.dtype",
    when="fp16 or bf16 into fp32; PyTorch from 2.8",
    takes=lambda total, a, b: _widens(total, a, b) and _TORCH >= (2, 8),
)
def _cuda_apart(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return total.add_(torch.ops.aten.mm.dtype(a.T, b, torch.float32))


class Sum:
    """What the gradients of one weight are added up in; ``tensor`` is None as long as there is none yet."""

    def __init__(self, tensor: Tensor | None = None) -> None:
        self.tensor = tensor

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether there is a sum, and not one narrower than operands of this type."""
        return self.tensor is not None and torch.promote_types(self.tensor.dtype, dtype) == self.tensor.dtype

    def add(self, grad: Tensor, rows: Tensor) -> None:
        """Add ``grad^T rows``; columns of ``grad`` beyond the sum's rows are padding and left out."""
        total = self.tensor
        assert total is not None
        if grad.shape[1] > len(total):
            # What is padded is to be aligned, and what cuBLAS aligns by is sizes too: the few last go by themselves.
            whole = len(total) - len(total) % 8
            accumulate_product_(total[whole:], grad[:, whole : len(total)], rows)
            total, grad = total[:whole], grad[:, :whole]
        accumulate_product_(total, grad, rows)


def accumulate_gradient(weight: Tensor, total: Tensor | None) -> Sum:
    """Let layers add the gradient of a weight to ``total``, of its or a wider type, and not hand it to autograd.

    What else uses the weight still hands its part to autograd, and the caller is to add that. The total may be set
    and taken away later, in what is returned: layers look when they have a gradient, so that forward passes and
    those that run again are alike.
    """
    made = Sum(total)
    setattr(weight, _TOTAL, made)
    return made


def accumulator(weight: Tensor) -> Sum | None:
    """Return what a layer is to add the gradient of a weight to, from level 1; None: hand it to autograd.

    In a compiled block there is none: what is added up in would be a part of the graph.
    """
    wanted = level() >= 1 and weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return getattr(weight, _TOTAL, None) if wanted else None


def weight_gradient(total: Sum | None, grad: Tensor, rows: Tensor) -> Tensor | None:
    """Return ``grad^T rows``, or add it to ``total`` if there is one that takes it and return None."""
    if total is None or not total.takes(grad.dtype):
        return grad.T @ rows
    total.add(grad, rows)
    return None


def rows(x: Tensor) -> Tensor:
    """Return ``[..., width]`` as a contiguous ``[rows, width]``."""
    return x.reshape(-1, x.shape[-1]).contiguous()


@op
def sum_rows(x: Tensor) -> Tensor:
    """Return the sum ``[width]`` of ``[rows, width]``, for backward passes: some entries have no derivative."""
    return x.sum(0)


@sum_rows.on(
    "cuda",
    "triton",
    when="fp16, bf16; a contiguous constant; 2^20 elements or more",  # below, PyTorch's one kernel is soon done
    takes=lambda x: (
        eager_triton(x) and x.dtype in HALVES and x.numel() >= 2**20 and x.is_contiguous() and not x.requires_grad
    ),
)
def _cuda_sum_rows(x: Tensor) -> Tensor:
    from . import kernels

    return kernels.sum_rows(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + b`` by one product: of three dims that lie in no one piece PyTorch may make one for each row."""
    whole = x.dim() < 3 or torch.compiler.is_compiling()
    return F.linear(x if whole else x.contiguous(), weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b`` for ``weight [out, in]``; its gradient goes where ``accumulate_gradient`` said."""
    total = accumulator(weight)
    return product(x, weight, bias) if total is None else _Linear.apply(x, weight, bias, total)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, total: Sum) -> Tensor:
        ctx.total = total
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        flat = rows(grad)
        to_x = (flat @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        to_bias = sum_rows(flat) if ctx.needs_input_grad[2] else None
        return to_x, weight_gradient(ctx.total, flat, rows(x)), to_bias, None
