"""Operands for every op, and the formula that its value and gradients must equal: on any device, in any type.

``CASES`` serves the unit tests on the CPU, the npu tier, the device tier and the benchmark.
"""

from __future__ import annotations

from . import activation, adaln, loss, norm, rope
from .case import Case, check, run, wanted

CASES: tuple[Case, ...] = (*norm.CASES, *activation.CASES, *rope.CASES, *adaln.CASES, *loss.CASES)

__all__ = ["CASES", "Case", "check", "run", "wanted"]
