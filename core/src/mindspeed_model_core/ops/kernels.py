"""Triton kernels for CUDA, where PyTorch's own and its compiler's move more memory than they must or move it slowly.

Each reads its operands once and writes its results once. Import it only where ``installed`` says so.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device as devices

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


def layer_norm(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, one: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``normed * (one + scale) + shift`` of contiguous rows ``x [..., width]``, and what backward needs of them.

    ``scale`` and ``shift``, both or neither, are ``[width]``, or ``[samples, width]`` where row ``i`` is of sample
    ``i % samples``; they may be of other types than ``x``, and their rows apart. What is normed is ``x``, or the sum,
    as it is rounded, with a contiguous ``residual`` of its shape and type. That is kept, and of each row its mean and
    1 / deviation, ``[rows, 2]`` in fp32.
    """
    cut = _Cut(x, scale)
    out, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    kept = x.new_empty((cut.tokens * cut.samples, 2), dtype=torch.float32)
    _layer_norm[cut.grid](
        x, residual, scale, shift, total, out, kept, *cut.sizes, _stride(scale), _stride(shift), eps, one, **cut.tile
    )
    return out, x if total is None else total, kept


def layer_norm_backward(
    x: Tensor,
    scale: Tensor | None,
    kept: Tensor,
    grad: Tensor,
    one: float,
    needs: tuple[bool, ...],
    grad_x: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``x``, ``scale`` and ``shift`` of ``layer_norm``, each where ``needs`` says so.

    ``x`` is what was normed; to its gradient, what else it got, ``grad_x``, is added. The gradient of ``shift`` is of
    the type and shape of ``scale``.
    """
    cut, (needs_x, *needs_sums) = _Cut(x, scale), needs
    to_x = torch.empty_like(x) if needs_x else None
    sums = x.new_empty((sum(needs_sums), cut.parts, cut.samples, cut.width), dtype=torch.float32)
    to_scale, to_shift = _given(sums, needs_sums)
    _layer_norm_backward[cut.grid](
        x, grad, grad_x, scale, kept, to_x, to_scale, to_shift, *cut.sizes, _stride(scale), one, **cut.tile
    )
    if scale is None or not any(needs_sums):
        return to_x, None, None
    return to_x, *_given(_sum_parts(sums.flatten(2), scale.dtype).view(-1, *scale.shape), needs_sums)


class _Cut:
    """How rows are shared out: each of a grid's programs walks over its part of one sample's, some at a time.

    Rows are whole in registers, 16 elements a thread. There are no more programs than the device holds at once: one
    that waits for another's end would double the time.
    """

    def __init__(self, x: Tensor, scale: Tensor | None) -> None:
        self.width = x.shape[-1]
        self.samples = 1 if scale is None else scale.numel() // self.width
        self.tokens = x.numel() // (self.samples * self.width)
        block = triton.next_power_of_2(self.width)
        some = max(_BLOCK // block, 1)
        programs = _multiprocessors(x.device) * max(4 * _BLOCK // (some * block), 1)
        self.parts = min(max(programs // self.samples, 1), triton.cdiv(self.tokens, some))
        self.grid = (self.parts * self.samples,)
        self.sizes = self.tokens, self.samples, self.width
        self.tile = {"ROWS": some, "BLOCK": block, "num_warps": some * block // 512}


def _stride(vectors: Tensor | None) -> int:
    return 0 if vectors is None else vectors.stride(0)


def _given(made: Tensor, needs: list[bool]) -> list[Tensor | None]:
    each = iter(made)
    return [next(each) if needed else None for needed in needs]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["tokens"])
def _layer_norm(  # type: ignore[no-untyped-def]
    x, residual, scale, shift, total, out, kept, tokens, samples, width, scale_row, shift_row, eps, one,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, at = tl.program_id(0), tl.arange(0, BLOCK)
    sample, wide = (program % samples).to(tl.int64), at < width
    if scale is not None:
        by = tl.load(scale + sample * scale_row + at, mask=wide, other=0.0).to(tl.float32) + one
        to = tl.load(shift + sample * shift_row + at, mask=wide, other=0.0).to(tl.float32)
    step = tl.num_programs(0) // samples * ROWS
    for first in tl.range(program // samples * ROWS, tokens, step, num_stages=3):
        token = first + tl.arange(0, ROWS).to(tl.int64)
        row, there = token * samples + sample, token < tokens
        place, here = (row * width)[:, None] + at[None, :], there[:, None] & wide[None, :]
        a = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
        if residual is not None:
            a = (a + tl.load(residual + place, mask=here, other=0.0)).to(x.dtype.element_ty)
            tl.store(total + place, a, mask=here)
            a = a.to(tl.float32)
        m = tl.sum(a, 1) / width
        a = tl.where(here, a - m[:, None], 0.0)
        r = tl.rsqrt(tl.sum(a * a, 1) / width + eps)
        a *= r[:, None]
        if scale is not None:
            a = a * by[None, :] + to[None, :]
        tl.store(out + place, a, mask=here)
        tl.store(kept + 2 * row, m, mask=there)
        tl.store(kept + 2 * row + 1, r, mask=there)


@triton.jit(do_not_specialize=["tokens"])
def _layer_norm_backward(  # type: ignore[no-untyped-def]
    x, grad, grad_x, scale, kept, to_x, to_scale, to_shift, tokens, samples, width, scale_row, one,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, at = tl.program_id(0), tl.arange(0, BLOCK)
    sample, wide = (program % samples).to(tl.int64), at < width
    if scale is not None:
        by = tl.load(scale + sample * scale_row + at, mask=wide, other=0.0).to(tl.float32) + one
    sum_scale = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_shift = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0) // samples * ROWS
    for first in tl.range(program // samples * ROWS, tokens, step, num_stages=3):
        token = first + tl.arange(0, ROWS).to(tl.int64)
        row, there = token * samples + sample, token < tokens
        place, here = (row * width)[:, None] + at[None, :], there[:, None] & wide[None, :]
        a = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=here, other=0.0).to(tl.float32)
        m = tl.load(kept + 2 * row, mask=there, other=0.0)[:, None]
        r = tl.load(kept + 2 * row + 1, mask=there, other=0.0)[:, None]
        a = (a - m) * r
        if to_scale is not None:
            sum_scale += g * a
        if to_shift is not None:
            sum_shift += g
        if to_x is not None:
            if scale is not None:
                g *= by[None, :]
            g -= (tl.sum(g * a, 1) / width)[:, None] * a + (tl.sum(g, 1) / width)[:, None]
            g *= r
            if grad_x is not None:
                g += tl.load(grad_x + place, mask=here, other=0.0)
            tl.store(to_x + place, g, mask=here)
    if to_scale is not None:
        tl.store(to_scale + program.to(tl.int64) * width + at, tl.sum(sum_scale, 0), mask=wide)
    if to_shift is not None:
        tl.store(to_shift + program.to(tl.int64) * width + at, tl.sum(sum_shift, 0), mask=wide)


def sum_rows(x: Tensor) -> Tensor:
    """Return the sum ``[width]`` of contiguous ``[rows, width]`` in its type, added up in fp32."""
    rows, width = x.shape
    tile = {"ROWS": 32, "BLOCK": 128}
    columns = triton.cdiv(width, tile["BLOCK"])
    parts = min(triton.cdiv(_multiprocessors(x.device) * 4, columns), triton.cdiv(rows, tile["ROWS"]))
    sums = x.new_empty((1, parts, width), dtype=torch.float32)
    _sum_rows[(columns, parts)](x, sums, rows, width, **tile, num_warps=4)
    return _sum_parts(sums, x.dtype)[0]


def _sum_parts(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums ``[n, width]`` over ``parts`` of contiguous ``[n, parts, width]`` in fp32, as ``dtype``."""
    n, parts, width = sums.shape
    out = sums.new_empty((n, width), dtype=dtype)
    tile = {"ROWS": 128, "BLOCK": 32}  # narrow: a norm leaves many parts, and programs are few
    _sum_rows[(triton.cdiv(width, tile["BLOCK"]), 1, n)](sums, out, parts, width, **tile, num_warps=4)
    return out


@triton.jit(do_not_specialize=["rows"])
def _sum_rows(x, sums, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    n, wide = tl.program_id(2).to(tl.int64), at < width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(part * ROWS, rows, tl.num_programs(1) * ROWS, num_stages=3):
        row = first + tl.arange(0, ROWS).to(tl.int64)
        place, here = (row * width)[:, None] + at[None, :], (row < rows)[:, None] & wide[None, :]
        total += tl.load(x + n * rows * width + place, mask=here, other=0.0).to(tl.float32)
    tl.store(sums + (n * tl.num_programs(1) + part) * width + at, tl.sum(total, 0), mask=wide)


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
    weights: list[Tensor], grads: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], told: Tensor, *,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Update tensors, all of one type on one device and contiguous, in fp32: one kernel, which is told where they lie.

    ``told``, fp32 on the device, holds both moments' corrections ``1 - beta ** step``, what divides the gradient, and
    whether to leave everything as it is.
    """
    device, sizes = told.device, tuple(map(Tensor.numel, weights))
    parts = _parts(device, sizes)
    if not len(parts):
        return
    columns = *(map(Tensor.data_ptr, some) for some in (weights, grads, firsts, seconds)), sizes
    # Not torch.tensor, which takes four times as long: a list has thousands.
    table = np.array([number for column in columns for number in column], np.int64).reshape(len(columns), -1)
    _adamw[(len(parts),)](
        devices.send(torch.from_numpy(table.T.copy()), device), parts, weights[0], told,
        lr, 1 - betas[0], 1 - betas[1], eps, weight_decay, BLOCK=_BLOCK,
    )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _parts(device: torch.device, sizes: tuple[int, ...]) -> Tensor:
    """Return what each program works on, ``[programs, 2]``: which of tensors of these sizes, and which block of it."""
    blocks = torch.tensor([triton.cdiv(size, _BLOCK) for size in sizes])
    tensor = torch.arange(len(sizes)).repeat_interleave(blocks)
    block = torch.arange(len(tensor)) - (blocks.cumsum(0) - blocks)[tensor]
    return devices.send(torch.stack((tensor, block), 1).int(), device)


@triton.jit
def _adamw(  # type: ignore[no-untyped-def]
    table, parts, like, told, lr, new_first, new_second, eps, decay, BLOCK: tl.constexpr
):
    part = parts + 2 * tl.program_id(0)
    row, start = table + 5 * tl.load(part), tl.load(part + 1).to(tl.int64) * BLOCK
    weight, grad, first, second = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    left = tl.load(row + 4) - start
    if tl.load(told + 3) == 0:
        # Loads are of 16 bytes only where it is known that they begin at a multiple and that no mask cuts them.
        if (left >= BLOCK) & ((weight | grad | first | second) % 16 == 0):
            at = start + tl.arange(0, BLOCK)
            _adamw_part(weight, grad, first, second, at, None, like, told, lr, new_first, new_second, eps, decay)
        else:
            SOME: tl.constexpr = BLOCK // 4  # all at once would take so many registers that few programs fit
            for place in range(0, tl.minimum(left, BLOCK), SOME):
                at = place + tl.arange(0, SOME)
                here, at = at < left, start + at
                _adamw_part(weight, grad, first, second, at, here, like, told, lr, new_first, new_second, eps, decay)


@triton.jit
def _adamw_part(  # type: ignore[no-untyped-def]
    weight, grad, first, second, at, here, like, told, lr, new_first, new_second, eps, decay
):
    kind: tl.constexpr = like.dtype
    weight, grad, first, second = weight.to(kind), grad.to(kind), first.to(kind), second.to(kind)
    if here is None:
        tl.multiple_of(weight, 16), tl.multiple_of(grad, 16), tl.multiple_of(first, 16), tl.multiple_of(second, 16)
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
