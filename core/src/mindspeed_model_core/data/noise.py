"""Random features to measure with, which cost a step next to nothing."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_PLACES = 4096


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """Return normal numbers of a shape, in fp32: a window, placed by the seed, of numbers that are drawn once.

    To be read alone: windows share their memory.
    """
    count, first = math.prod(shape), seed % _PLACES
    return _drawn(count)[first : first + count].view(*shape)


@functools.cache
def _drawn(count: int) -> Tensor:
    return torch.randn(count + _PLACES, generator=torch.Generator().manual_seed(count))
