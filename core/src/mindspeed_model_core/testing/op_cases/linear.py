"""Sums of products and of rows, and linear maps with adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from ..tolerance import assert_close
from .case import Case, draw

SIZES = ((37, 7, 5), (1, 24, 16), (257, 96, 80), (4, 65536, 1), (4, 1, 65536), (0, 7, 5))
"""Tokens, and the two widths of the sum."""
ROWS = ((0, 5), (3, 7), (9000, 300), (9, 120001))
"""Rows of a sum, and their width."""
HALVES = (torch.bfloat16, torch.float16)
EXACT = 2e-5


def check_accumulate_product_(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Hold sums of products against those in fp64; one half stands for both.

    A half's sum must be fp32's whatever the bound: in the operands' type, or of a product rounded to it, it would be
    off by a hundred times what is allowed.
    """
    for kind in HALVES if dtype in HALVES else (dtype,):
        for tokens, out, width in SIZES:
            total = draw(out, width).to(torch.promote_types(kind, torch.float32))
            a, b = draw(tokens, out, seed=1).to(kind), draw(tokens, width, seed=2).to(kind)
            memory = torch.zeros(2 * total.numel(), dtype=total.dtype, device=device)
            here, after = memory[: total.numel()].view_as(total).copy_(total), memory[total.numel() :]
            assert ops.accumulate_product_(here, a.to(device), b.to(device)) is here, "it is in place"
            name = f"{kind} {tokens}x{out}x{width}"
            found: dict[str, Tensor] = {name: here.cpu().double(), "what lies behind": after.cpu().double()}
            want = {name: total.double() + a.double().T @ b.double(), "what lies behind": torch.zeros_like(after.cpu())}
            assert_close(found, want, min(bound, EXACT) if kind in HALVES else bound)


def _adapted(
    x: Tensor, weight: Tensor, bias: Tensor, low: Tensor, b: Tensor, places: tuple[tuple[int, int], ...]
) -> Tensor:
    y, rank, at = x @ weight.T + bias, b.shape[1], 0
    for number, (first, count) in enumerate(places):
        spread = torch.zeros(count, y.shape[-1], dtype=y.dtype)
        spread[:, first : first + count] = torch.eye(count)
        y = y + low[..., number * rank : (number + 1) * rank] @ b[at : at + count].T @ spread
        at += count
    return y


RANK = 3
CASES = tuple(
    Case(
        ops.adapted_linear,
        f"{'x'.join(map(str, shape))}-{number}",
        (
            draw(*shape, 16),
            draw(24, 16),
            draw(24),
            draw(*shape, RANK * len(places)),
            draw(sum(count for _, count in places), RANK),
        ),
        _adapted,
        (places,),
        constant=(1, 2),
    )
    for shape in ((70,), (7, 2), (0, 2))
    for number, places in enumerate((((0, 24),), ((0, 8), (8, 8), (16, 8)), ((8, 8),)))
)


def check_sum_rows(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Hold sums of rows against those in fp64; every entry's type, few rows and many, and any width."""
    for kind in HALVES if dtype in HALVES else (dtype,):
        for shape in ROWS:
            x = draw(*shape).to(kind)
            found = ops.sum_rows(x.to(device))
            assert found.dtype == kind
            assert_close({str(shape): found.cpu().double()}, {str(shape): x.double().sum(0)}, bound)
