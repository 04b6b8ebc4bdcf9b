"""Mixtures of experts: tokens sorted by expert, a matrix product for each group of them, and tokens put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import FLOATS, op

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@op
def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return each group of rows times its expert's matrix: ``[rows, in]`` by ``[experts, in, out]``.

    ``counts`` are the rows of each group, int64 ``[experts]`` on the device, zeros among them or not; their sum is
    the number of rows. The reference waits for the device to know them, what serves it elsewhere does not.
    """
    groups = x.split(counts.tolist())
    return torch.cat([rows @ matrix for rows, matrix in zip(groups, weight.unbind(), strict=True)])


class _Grouped(torch.autograd.Function):
    """The derivative of a grouped product, made of two more, by a library's kernels.

    ``rows(x, weight, counts)`` multiplies groups of rows; ``columns(a, b, counts)`` gives ``a @ b`` for each group of
    ``a``'s columns and ``b``'s rows, a group without any gives zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor, rows: Product, columns: Product) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        ctx.products = rows, columns
        return rows(x, weight, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, counts = ctx.saved_tensors
        rows, columns = ctx.products
        grad = grads[0].contiguous()  # that of a sum is one number spread over the shape
        dx = rows(grad, weight.mT, counts) if ctx.needs_input_grad[0] else None
        dweight = columns(x.mT, grad, counts) if ctx.needs_input_grad[1] else None
        return dx, dweight, None, None, None


def _npu_product(a: Tensor, b: Tensor, counts: Tensor, axis: int) -> Tensor:
    return torch.ops.npu.npu_grouped_matmul(  # type: ignore[no-any-return]
        [a], [b], group_list=counts, split_item=3, group_type=axis, group_list_type=1
    )[0]


@grouped_matmul.on(
    "npu",
    "npu_grouped_matmul",
    when="fp16, bf16, fp32, both alike; 2 experts or more, a row or more, widths below 65536",
    takes=lambda x, weight, counts: (
        x.dtype in FLOATS
        and weight.dtype == x.dtype
        and len(x) > 0
        and len(weight) > 1
        and max(weight.shape[1:]) < 65536
    ),
)
def _npu_grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _Grouped.apply(  # type: ignore[no-any-return, no-untyped-call]
        x, weight, counts, lambda a, b, n: _npu_product(a, b, n, 0), lambda a, b, n: _npu_product(a, b, n, 2)
    )


def _cuda_product(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=counts.cumsum(0, dtype=torch.int32))


@grouped_matmul.on(
    "cuda",
    "grouped_mm",
    when="bf16; a row or more, widths that 8 divides; torch 2.10, compute capability 8.0",
    takes=lambda x, weight, counts: (
        hasattr(F, "grouped_mm")
        and x.dtype == weight.dtype == torch.bfloat16
        and len(x) > 0
        and all(width % 8 == 0 for width in weight.shape[1:])  # rows begin at 16 bytes
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    ),
)
def _cuda_grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    operands = x.contiguous(), weight.contiguous(), counts
    return _Grouped.apply(*operands, _cuda_product, _cuda_product)  # type: ignore[no-any-return, no-untyped-call]


@op
def permute_tokens(tokens: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return a row for each expert that a token goes to, sorted by expert, and where each row went.

    ``tokens`` are ``[tokens, width]``, ``experts`` whole numbers ``[tokens, k]``. The rows of an expert keep the
    tokens' order. ``places``, int32 ``[tokens * k]``, holds for each token and choice in turn its row.
    """
    order = experts.flatten().argsort(stable=True)
    places = torch.empty_like(order, dtype=torch.int32)
    places[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return tokens.index_select(0, order // experts.shape[1]), places


@permute_tokens.on(
    "npu",
    "npu_moe_token_permute npu_moe_token_permute_grad_v2",
    when="fp16, bf16, fp32; experts int32 or int64, 512 a token or fewer, below 16777215 in all; a token or more",
    takes=lambda tokens, experts: (
        tokens.dtype in FLOATS
        and experts.dtype in (torch.int32, torch.int64)
        and experts.shape[1] <= 512
        and 0 < experts.numel() < 16777215
    ),
)
def _npu_permute_tokens(tokens: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    rows, places = torch.ops.npu.npu_moe_token_permute(tokens, experts)
    return rows, places


@op
def unpermute_tokens(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sum of each token's rows: ``permute_tokens`` backwards.

    ``rows`` are ``[tokens * k, width]``, ``places`` those of ``permute_tokens``, ``weights`` ``[tokens, k]``.
    """
    found = rows.index_select(0, places).view(*weights.shape, rows.shape[1])
    return (found * weights[..., None]).sum(1).to(rows.dtype)


@unpermute_tokens.on(
    "npu",
    "_npu_moe_token_unpermute npu_moe_token_unpermute_grad_v2",
    when="fp16, bf16, fp32; places int32; 512 experts a token or fewer, a token or more",
    takes=lambda rows, places, weights: (
        rows.dtype in FLOATS
        and weights.dtype in FLOATS
        and places.dtype == torch.int32
        and 0 < weights.shape[1] <= 512
        and len(rows) > 0
    ),
)
def _npu_unpermute_tokens(rows: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    return torch.ops.npu.npu_moe_token_unpermute(rows, places, probs=weights)  # type: ignore[no-any-return]
