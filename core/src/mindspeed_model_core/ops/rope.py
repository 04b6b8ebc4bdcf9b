"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), for tokens in a row and on a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .keep import keeps
from .linear import PRODUCTS
from .norm import rms_norm
from .table import FLOATS, compiled, eager_triton, op

Tables = tuple[Tensor, Tensor]


def rope_tables(positions: Tensor, dim: int, theta: float) -> Tables:
    """Return cos and sin ``[tokens, dim]`` in fp32 for integer positions; element i pairs with i + dim/2."""
    angle = _angles(positions, dim, theta, torch.float32)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def grid_rope_tables(grid: Sequence[int], dims: Sequence[int], theta: float, device: torch.device) -> Tables:
    """Return cos and sin ``[tokens, sum of dims]`` in fp32 for the cells of a grid, the last axis fastest.

    Axis a turns ``dims[a]`` of the elements by its own coordinate; element 2i pairs with 2i + 1.
    """
    axes = [torch.arange(size, device=device) for size in grid]
    cells = torch.cartesian_prod(*axes).view(-1, len(axes))
    # In fp64 up to the angle, as the original: far tokens at the highest frequency need the digits.
    angles = [_angles(cells[:, a], dim, theta, torch.float64) for a, dim in enumerate(dims)]
    angle = torch.cat(angles, -1).repeat_interleave(2, -1)
    return angle.cos().float(), angle.sin().float()


def _angles(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    frequency = 1.0 / theta ** (torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim)
    return positions.to(dtype)[:, None] * frequency


@op
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [tokens, heads, dim]`` by the tables ``[tokens, dim]``; element i pairs with i + dim/2."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.addcmul(x * cos, turned, sin)


@op
def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [tokens, ..., dim]`` by the tables ``[tokens, dim]``, in fp32 or wider; 2i pairs with 2i + 1."""
    shape = (len(x), *(1,) * (x.dim() - 2), x.shape[-1])
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), -1).flatten(-2)
    return (x * cos.view(shape) + turned * sin.view(shape)).to(x.dtype)


@op
def norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Return ``rope_interleaved(rms_norm(x))`` of heads ``x [tokens, batch, heads, dim]``.

    Each head is normed alone by a ``weight [dim]``, or all of a token together by one ``[heads * dim]``.
    """
    return rope_interleaved.reference(_normed(rms_norm.reference, x, weight, eps), cos, sin)


def _normed(norm: Callable[..., Tensor], x: Tensor, weight: Tensor, eps: float) -> Tensor:
    alone = weight.shape[0] == x.shape[-1]
    return norm(x, weight, eps) if alone else norm(x.flatten(-2), weight, eps).unflatten(-1, x.shape[-2:])


def _kernel_turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether torch_npu's kernel takes the types and the width, and nobody asks for the tables' gradients."""
    constant = not (cos.requires_grad or sin.requires_grad)
    return constant and x.dtype in FLOATS and cos.dtype == sin.dtype == torch.float32 and x.shape[-1] < 896


def _kernel_turns_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return _kernel_turns(x, cos, sin) and x.dim() in (3, 4) and math.prod(x.shape[1:-1]) < 1000


@rope.on(
    "npu",
    "npu_rotary_mul npu_rotary_mul_backward",
    when="fp16, bf16, fp32; constant tables; dim below 896, fewer than 1000 heads",
    takes=lambda x, cos, sin: _kernel_turns(x, cos, sin) and x.shape[1] < 1000,
)
def _npu_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (table.to(x.dtype)[None, :, None] for table in (cos, sin))
    return torch.ops.npu.npu_rotary_mul(x[None], cos, sin, "half")[0]  # type: ignore[no-any-return]


@rope_interleaved.on(
    "npu",
    "npu_rotary_mul npu_rotary_mul_backward",
    when="fp16, bf16, fp32; constant tables; 3 or 4 dims, dim below 896, fewer than 1000 heads in all samples",
    takes=_kernel_turns_pairs,
)
def _npu_rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None, None], sin[:, None, None]
    wide = x.float() if x.dim() == 4 else x.float()[:, None]
    turned: Tensor = torch.ops.npu.npu_rotary_mul(wide, cos, sin, "interleave")
    return turned.view(x.shape).to(x.dtype)


def _eager_with(cos: Tensor, sin: Tensor) -> bool:
    """Whether tables are constant, and nothing compiles: a compiler does better by the formula."""
    return not (cos.requires_grad or sin.requires_grad or torch.compiler.is_compiling())


class _Turn(torch.autograd.Function):
    """Rotates each half into memory that is there already; backward turns the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = x * cos
        (first, second), (to_first, to_second), (of_first, of_second) = (t.chunk(2, -1) for t in (x, out, sin))
        to_first.addcmul_(second, of_first, value=-1)
        to_second.addcmul_(first, of_second)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        out = grad * cos
        (first, second), (to_first, to_second), (of_first, of_second) = (t.chunk(2, -1) for t in (grad, out, sin))
        to_first.addcmul_(second, of_second)
        to_second.addcmul_(first, of_first, value=-1)
        return out, None, None


@rope.on("cpu", "addcmul_", when="constant tables", takes=lambda x, cos, sin: _eager_with(cos, sin))
def _in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _Turn.apply(x, cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None])


@rope_interleaved.on(
    "cpu",
    "view_as_complex",
    when="fp32, fp64; constant tables of its type; contiguous heads",
    takes=lambda x, cos, sin: (
        x.dtype == cos.dtype == sin.dtype
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous()
        and _eager_with(cos, sin)
    ),
)
def _as_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # A pair is a complex number, and its turn one product.
    turn = torch.complex(cos[:, ::2].contiguous(), sin[:, ::2].contiguous())
    turn = turn.view(len(x), *(1,) * (x.dim() - 2), x.shape[-1] // 2)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


rope.compiled_on("cuda")
rope_interleaved.compiled_on("cuda")
norm_rope.compiled_on("cuda")


@norm_rope.on("cpu", "")
@norm_rope.on(
    "npu",
    "npu_rms_norm npu_rms_norm_backward npu_rotary_mul npu_rotary_mul_backward",
    when="fp16, bf16, fp32; scale of the same type; constant tables; dim below 896, fewer than 1000 heads in all",
    takes=lambda x, weight, cos, sin, eps: weight.dtype == x.dtype and _kernel_turns_pairs(x, cos, sin),
)
def _in_turn(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    return rope_interleaved(_normed(rms_norm, x, weight, eps), cos, sin)


@op
def rope_projected_(x: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of a joint projection, q and k turned as by ``rope``.

    ``x [tokens, heads + 2 * kv_heads, dim]`` holds their heads in this order and is given up: it may be overwritten.
    The tables are ``[tokens, dim]``.
    """
    turned, v = x.split((x.shape[1] - kv_heads, kv_heads), 1)
    q, k = rope(turned, cos, sin).split((turned.shape[1] - kv_heads, kv_heads), 1)
    return q, k, v


class _InPlace(torch.autograd.Function):
    """Turns q and k where they lie; backward writes the three gradients into one, turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
        from . import kernels

        q, k, v = x.detach().split((x.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
        kernels.turn([q, k], cos, sin, x)
        ctx.save_for_backward(cos, sin)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from . import kernels

        tokens, _, dim = grads[0].shape
        out = grads[0].new_empty(tokens, sum(g.shape[1] for g in grads), dim)
        # Heads that lie in one piece may come in any order of tokens.
        whole = [g if g.stride()[1:] == (dim, 1) else g.contiguous() for g in grads]
        cos, sin = ctx.saved_tensors
        kernels.turn(whole, cos, sin, out, back=True)
        return out, None, None, None


def _turns_in_place(x: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> bool:
    dim, constant = x.shape[-1], not (cos.requires_grad or sin.requires_grad)
    tables = constant and cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous() and sin.is_contiguous()
    whole = cos.shape == sin.shape == (len(x), dim) and x.stride()[1:] == (dim, 1)
    fits = whole and x.numel() > 0 and dim > 1 and dim & (dim - 1) == 0
    return tables and fits and not keeps(PRODUCTS) and eager_triton(x)


rope_projected_.on(
    "cuda",
    "triton",
    when="fp16, bf16, fp32; constant tables; dim a power of 2; the projection need not be kept",
    takes=_turns_in_place,
)(_InPlace.apply)


@rope_projected_.on("cuda", "torch.compile")
@compiled
def _projected(x: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return rope_projected_.reference(x, cos, sin, kv_heads)
