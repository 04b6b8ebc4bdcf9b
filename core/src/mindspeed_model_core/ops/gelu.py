"""GELU of what lies beside something else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import op


@op
def join_gelu(y: Tensor, x: Tensor) -> Tensor:
    """Return ``y`` and the tanh approximation of ``gelu(x)`` side by side along the last dim.

    Hendrycks and Gimpel 2016, arXiv:1606.08415. Either may be a slice of something wider.
    """
    return torch.cat((y, F.gelu(x, approximate="tanh")), -1)


# PyTorch's kernel for GELU is slow on a slice, and joining would be a pass of its own.
join_gelu.compiled_on("cuda")
