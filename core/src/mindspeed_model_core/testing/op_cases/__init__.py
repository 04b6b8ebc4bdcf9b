"""Operands for every op, and the formula that its value and gradients must equal: on any device, in any type.

``CASES`` serves the unit tests on the CPU, the npu tier, the device tier and the benchmark.
"""

from __future__ import annotations

from . import activation, attention, norm
from .case import Case, check

CASES: tuple[Case, ...] = (*norm.CASES, *activation.CASES, *attention.CASES)

__all__ = ["CASES", "Case", "check"]
