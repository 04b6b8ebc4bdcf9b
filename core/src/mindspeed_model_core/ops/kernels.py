"""Triton kernels for CUDA, where PyTorch's own and its compiler's move more memory than they must or move it slowly.

Each reads its operands once and writes its results once. Import it only where ``installed`` says so.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


def swiglu(x: Tensor) -> Tensor:
    """Return ``silu(a) * b`` of rows ``[a, b]`` that lie one after the other."""
    width = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    _swiglu[_grid(x, width)](x, out, width, BLOCK=_BLOCK)
    return out


def swiglu_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of ``swiglu(x)``."""
    width = x.shape[-1] // 2
    out = x.new_empty(x.shape)
    _swiglu_backward[_grid(x, width)](x, grad, out, width, BLOCK=_BLOCK)
    return out


def _grid(x: Tensor, width: int) -> tuple[int, int]:
    return x.numel() // (2 * width), triton.cdiv(width, _BLOCK)


@triton.jit
def _swiglu(x, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    a = tl.load(x + row * 2 * width + at, mask=here).to(tl.float32)
    b = tl.load(x + row * 2 * width + width + at, mask=here).to(tl.float32)
    tl.store(out + row * width + at, a * tl.sigmoid(a) * b, mask=here)


@triton.jit
def _swiglu_backward(x, grad, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < width
    a = tl.load(x + row * 2 * width + at, mask=here).to(tl.float32)
    b = tl.load(x + row * 2 * width + width + at, mask=here).to(tl.float32)
    g = tl.load(grad + row * width + at, mask=here).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(out + row * 2 * width + at, g * b * s * (1 + a * (1 - s)), mask=here)
    tl.store(out + row * 2 * width + width + at, g * a * s, mask=here)


def turn(heads: list[Tensor], cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> None:
    """Write heads ``[tokens, heads, dim]`` side by side into ``out``, all but a third group turned, or turned ``back``.

    Each head must lie in one piece, and those of a token too; ``out`` may be what they are parts of. Tables are fp32
    ``[tokens, dim]``, contiguous; ``dim`` is twice a power of 2.
    """
    q, k, v = heads if len(heads) == 3 else (*heads, heads[-1])
    _turn[(len(out),)](
        q, k, v, out, cos, sin, q.shape[1], k.shape[1], v.shape[1] if len(heads) == 3 else 0,
        q.stride(0), k.stride(0), v.stride(0), out.stride(0), -1.0 if back else 1.0,
        HALF=out.shape[2] // 2, HEADS=8, num_warps=4,
    )  # fmt: skip


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    q, k, v, out, cos, sin, q_heads, k_heads, v_heads, q_row, k_row, v_row, out_row, sign,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token, at, some = tl.program_id(0).to(tl.int64), tl.arange(0, HALF)[None, :], tl.arange(0, HEADS)[:, None]
    c = tl.load(cos + token * 2 * HALF + at)
    s = tl.load(sin + token * 2 * HALF + at) * sign
    to = out + token * out_row
    for first in range(0, q_heads, HEADS):
        here, place = first + some < q_heads, (first + some) * 2 * HALF + at
        a = tl.load(q + token * q_row + place, mask=here).to(tl.float32)
        b = tl.load(q + token * q_row + place + HALF, mask=here).to(tl.float32)
        tl.store(to + place, a * c - b * s, mask=here)
        tl.store(to + place + HALF, b * c + a * s, mask=here)
    to += q_heads * 2 * HALF
    for first in range(0, k_heads, HEADS):
        here, place = first + some < k_heads, (first + some) * 2 * HALF + at
        a = tl.load(k + token * k_row + place, mask=here).to(tl.float32)
        b = tl.load(k + token * k_row + place + HALF, mask=here).to(tl.float32)
        tl.store(to + place, a * c - b * s, mask=here)
        tl.store(to + place + HALF, b * c + a * s, mask=here)
    to += k_heads * 2 * HALF
    for first in range(0, v_heads, HEADS):
        here, place = first + some < v_heads, (first + some) * 2 * HALF + at
        tl.store(to + place, tl.load(v + token * v_row + place, mask=here), mask=here)
        tl.store(to + place + HALF, tl.load(v + token * v_row + place + HALF, mask=here), mask=here)


def adamw_(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, told: Tensor, *, lr: float, betas: tuple[float, float],
    eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Update one tensor, all of one type and contiguous, in fp32.

    ``told``, fp32 on the device, holds both moments' corrections ``1 - beta ** step``, what divides the gradient, and
    whether to leave everything as it is.
    """
    count = weight.numel()
    _adamw[(triton.cdiv(count, _BLOCK),)](
        weight, grad, first, second, told, lr, 1 - betas[0], 1 - betas[1], eps, weight_decay, count, BLOCK=_BLOCK
    )


@triton.jit
def _adamw(  # type: ignore[no-untyped-def]
    weight, grad, first, second, told, lr, new_first, new_second, eps, decay, count, BLOCK: tl.constexpr
):
    if tl.load(told + 3) == 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        here = at < count
        g = tl.load(grad + at, mask=here).to(tl.float32) / tl.load(told + 2)
        w = tl.load(weight + at, mask=here).to(tl.float32)
        m = tl.load(first + at, mask=here).to(tl.float32)
        v = tl.load(second + at, mask=here).to(tl.float32)
        m += (g - m) * new_first
        v += (g * g - v) * new_second
        w -= lr * (m / tl.load(told) / (tl.sqrt(v / tl.load(told + 1)) + eps) + decay * w)
        tl.store(weight + at, w, mask=here)
        tl.store(first + at, m, mask=here)
        tl.store(second + at, v, mask=here)
