"""Normalisations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight`` over the last dim (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
