"""Measuring a recipe; what was measured here and published elsewhere to hold it against; and peers beside it."""

from .measurement import Ceilings, Measurement, from_random, measure, result, summary
from .provenance import commit, stack

__all__ = ["Ceilings", "Measurement", "commit", "from_random", "measure", "result", "stack", "summary"]
