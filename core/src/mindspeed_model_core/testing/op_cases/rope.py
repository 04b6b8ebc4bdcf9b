"""Rotary position embedding, by angles that no table was made for: a rotation is one for any."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from .case import Case, draw


def _half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply complex numbers whose parts are the halves."""
    half = x.shape[-1] // 2
    turn = torch.complex(cos[:, None, :half].to(x.dtype), sin[:, None, :half].to(x.dtype))
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply complex numbers whose parts lie side by side."""
    turn = torch.complex(cos[:, ::2].to(x.dtype), sin[:, ::2].to(x.dtype))
    turn = turn.view(len(x), *(1,) * (x.dim() - 2), x.shape[-1] // 2)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def _tables(tokens: int, dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    angle = 3 * draw(tokens, dim // 2, seed=5)
    angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def _half_case(*shape: int, apart: tuple[str, ...] = ()) -> Case:
    return Case(
        ops.rope,
        "x".join(map(str, shape)),
        (draw(*shape),),
        _half,
        _tables(shape[0], shape[-1], False),
        reference_on=apart,
    )


def _interleaved_case(*shape: int, apart: tuple[str, ...] = ()) -> Case:
    return Case(
        ops.rope_interleaved,
        "x".join(map(str, shape)),
        (draw(*shape),),
        _interleaved,
        _tables(shape[0], shape[-1], True),
        reference_on=apart,
    )


def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    dims = (-1,) if len(weight) == x.shape[-1] else (-2, -1)
    normed = x / (x.square().mean(dims, keepdim=True) + eps).sqrt()
    return _interleaved(normed * weight.view(x.shape[dims[0] :]), cos, sin)


def _norm_rope_case(together: bool, *shape: int, apart: tuple[str, ...] = ()) -> Case:
    return Case(
        ops.norm_rope,
        f"{'x'.join(map(str, shape))}{', heads together' if together else ''}",
        (draw(*shape), draw(shape[-1] * (shape[-2] if together else 1), seed=1)),
        _norm_rope,
        (*_tables(shape[0], shape[-1], True), 1e-2),
        reference_on=apart,
    )


def _projected(x: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
    q, k, v = x.split((x.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    return _half(q, cos, sin), _half(k, cos, sin), v


def _projected_case(kv_heads: int, *shape: int) -> Case:
    name = f"{'x'.join(map(str, shape))}, {kv_heads} for k and v"
    return Case(
        ops.rope_projected_, name, (draw(*shape),), _projected, (*_tables(shape[0], shape[-1], False), kv_heads)
    )


CASES = (
    *(
        _norm_rope_case(together, *shape)
        for together in (False, True)
        for shape in ((70, 2, 3, 64), (33, 1, 12, 80), (0, 2, 4, 64))
    ),
    _norm_rope_case(False, 3, 25, 40, 4, apart=("npu",)),
    *(_projected_case(*shape) for shape in ((3, 70, 9, 64), (2, 33, 12, 80), (1, 1, 3, 2), (2, 0, 8, 64))),
    *(_half_case(*shape) for shape in ((70, 3, 64), (33, 10, 80), (7, 2, 128), (1, 1, 2), (0, 4, 64), (3, 999, 4))),
    *(_half_case(*shape, apart=("npu",)) for shape in ((3, 1000, 4), (3, 2, 896))),
    *(
        _interleaved_case(*shape)
        for shape in ((70, 2, 3, 64), (33, 1, 12, 80), (7, 2, 4, 128), (5, 3, 64), (0, 2, 4, 64), (3, 27, 37, 4))
    ),
    *(_interleaved_case(*shape, apart=("npu",)) for shape in ((3, 25, 40, 4), (3, 2, 2, 896), (9, 64))),
)
