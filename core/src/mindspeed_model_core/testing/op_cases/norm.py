"""Norms."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from ..tolerance import assert_close
from .case import Case, draw

EPS = 1e-2  # large enough for its loss to show
SHAPES = ((70, 96), (7, 3, 130), (1, 8), (0, 8))
SHARE = 0.3
"""What a dropout drops where there is one."""


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None or bias is None else normed * weight + bias


def _add_rms(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _rms(x + residual, weight, eps), x + residual


def _add_layer(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *_: object
) -> tuple[Tensor, Tensor]:
    return _layer(x + residual, weight, bias, eps), x + residual


def _given(x: Tensor, square: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (square + eps).sqrt() * weight


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _vectors(shape: tuple[int, ...], count: int) -> tuple[Tensor, ...]:
    return tuple(draw(shape[-1], seed=seed) for seed in range(2, 2 + count))


CASES = (
    *(Case(ops.rms_norm, _name(s), (draw(*s), *_vectors(s, 1)), _rms, (EPS,)) for s in SHAPES),
    *(
        Case(ops.add_rms_norm, _name(s), (draw(*s), draw(*s, seed=1), *_vectors(s, 1)), _add_rms, (EPS,))
        for s in SHAPES
    ),
    Case(
        ops.add_rms_norm,
        "spread residual",
        (draw(5, 3, 8), draw(3, 8), draw(8, seed=2)),
        _add_rms,
        (EPS,),
        reference_on=("npu",),
    ),
    *(Case(ops.sum_of_squares, _name(s), (draw(*s),), lambda x: x.square().sum(-1, keepdim=True)) for s in SHAPES),
    *(
        Case(
            ops.rms_norm_given,
            _name(s),
            (draw(*s), draw(*s[:-1], 1, seed=1).square() + 0.5, *_vectors(s, 1)),
            _given,
            (EPS,),
        )
        for s in SHAPES
    ),
    *(Case(ops.layer_norm, _name(s), (draw(*s), *_vectors(s, 2)), _layer, (EPS,)) for s in SHAPES),
    Case(ops.layer_norm, "no parameters", (draw(7, 3, 130),), _layer, (None, None, EPS)),
    Case(ops.layer_norm, "40x1280", (draw(40, 1280), *_vectors((1280,), 2)), _layer, (EPS,)),
    Case(ops.layer_norm, "turned round", (draw(96, 70).T, *_vectors((96,), 2)), _layer, (EPS,)),
    Case(ops.layer_norm, "constant parameters", (draw(70, 96), *_vectors((96,), 2)), _layer, (EPS,), constant=(1, 2)),
    Case(
        ops.layer_norm, "learning a shift alone", (draw(70, 96), *_vectors((96,), 2)), _layer, (EPS,), constant=(0, 1)
    ),
    *(
        Case(ops.add_layer_norm, _name(s), (draw(*s), draw(*s, seed=1), *_vectors(s, 2)), _add_layer, (EPS,))
        for s in SHAPES
    ),
    *(
        Case(
            ops.add_layer_norm,
            name,
            (draw(70, 96), draw(70, 96, seed=1), *_vectors((96,), 2)),
            _add_layer,
            (EPS,),
            constant=constant,
            unused=unused,
        )
        for name, constant, unused in (
            ("sum unused", (), (1,)),
            ("norm unused", (), (0,)),
            ("constant parameters", (2, 3), ()),
            ("constant terms", (0, 1), (1,)),
            ("learning a residual and a shift", (0, 2), ()),
        )
    ),
    Case(
        ops.add_layer_norm,
        "40x1280",
        (draw(40, 1280), draw(40, 1280, seed=1), *_vectors((1280,), 2)),
        _add_layer,
        (EPS,),
    ),
    Case(
        ops.add_layer_norm,
        "turned round",
        (draw(96, 70).T, draw(96, 70, seed=1).T, *_vectors((96,), 2)),
        _add_layer,
        (EPS,),
    ),
    Case(
        ops.add_layer_norm,
        "not in training",
        (draw(70, 96), draw(70, 96, seed=1), *_vectors((96,), 2)),
        _add_layer,
        (EPS, SHARE, False),
    ),
    Case(
        ops.add_layer_norm,
        "spread residual",
        (draw(5, 3, 8), draw(3, 8), *_vectors((8,), 2)),
        _add_layer,
        (EPS,),
        reference_on=("npu",),
    ),
)


def check_dropout(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Hold ``add_layer_norm`` with dropout against its formula, for the elements that it has dropped by its own sum.

    The residual is small beside ``x``, so that what the sum holds tells what was dropped in any type.
    """
    operands = (draw(64, 300).sign() * 2, draw(64, 300, seed=1) / 4, *_vectors((300,), 2))
    x, residual, weight, bias = here = tuple(y.to(device, dtype).requires_grad_() for y in operands)
    torch.manual_seed(0)
    outs = ops.add_layer_norm(x, residual, weight, bias, EPS, SHARE, True)
    torch.manual_seed(0)
    again = ops.add_layer_norm(x, residual, weight, bias, EPS, SHARE, True)
    other = ops.add_layer_norm(x, residual, weight, bias, EPS, SHARE, True)
    assert torch.equal(outs[1], again[1]) and not torch.equal(outs[1], other[1]), "the mask is the generator's"

    kept = (outs[1].detach().cpu().double().abs() > 1.4).double() / (1 - SHARE)
    dropped = float((kept == 0).double().mean())
    assert abs(dropped - SHARE) < 0.02, dropped  # 6 standard deviations
    exact = a, b, c, d = tuple(y.detach().cpu().double().requires_grad_() for y in here)
    wanted = _add_layer(a * kept, b, c, d, EPS)
    weights = [draw(64, 300, seed=seed) for seed in (8, 9)]
    found = torch.autograd.grad(outs, here, [w.to(device, dtype) for w in weights])
    right = torch.autograd.grad(wanted, exact, [w.to(dtype).double() for w in weights])
    assert_close(
        {str(n): x.detach().cpu().double() for n, x in enumerate((*outs, *found))},
        {str(n): x.detach() for n, x in enumerate((*wanted, *right))},
        bound,
    )
