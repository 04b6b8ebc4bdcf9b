"""Products added up in a wider type than that of their operands: in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from ..tolerance import assert_close
from .case import draw

SIZES = ((37, 7, 5), (1, 24, 16), (257, 96, 80), (4, 65536, 1), (4, 1, 65536), (0, 7, 5))
"""Tokens, and the two widths of the sum."""
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
    x: Tensor, low: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, places: tuple[tuple[int, int], ...]
) -> Tensor:
    y = x @ weight.to(x.dtype).T + (0 if bias is None else bias.to(x.dtype))
    rank, at = b.shape[1], 0
    for number, (first, count) in enumerate(places):
        z = low[..., number * rank :][..., :rank]
        columns = torch.zeros(count, y.shape[-1], dtype=y.dtype)
        columns[:, first : first + count] = torch.eye(count)
        y = y + z @ b[at : at + count].T @ columns
        at += count
    return y
