"""Operands for every op, and the formula that its value and gradients must equal: on any device, in any type.

``CASES`` serves the unit tests on the CPU, the npu tier, the device tier and the benchmark. ``CHECKS`` are for ops
that are no function of operands alone (in place, by chance, or of what another op made), by name: each takes device,
type and bound.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import activation, adaln, adamw, attention, experts, linear, loss, norm, rope
from .case import Case, check, run, wanted

CASES: tuple[Case, ...] = (
    *norm.CASES,
    *activation.CASES,
    *linear.CASES,
    *rope.CASES,
    *adaln.CASES,
    *loss.CASES,
    *attention.CASES,
    *experts.CASES,
)
CHECKS: dict[str, Callable[[torch.device, torch.dtype, float], None]] = {
    "accumulate_product_": linear.check_accumulate_product_,
    "add_layer_norm": norm.check_dropout,
    "attention_backward": attention.check_ring,
    "adamw_": adamw.check_adamw_,
    "ema_adamw_": adamw.check_ema_adamw_,
    "linear_cross_entropy": loss.check_linear_cross_entropy,
    "sum_rows": linear.check_sum_rows,
}

__all__ = ["CASES", "CHECKS", "Case", "check", "run", "wanted"]
