"""Gated activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .table import FLOATS, op


@op
def swiglu(x: Tensor) -> Tensor:
    """Return ``silu(a) * b`` for ``x = [a, b]`` along the last dim (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@swiglu.on("npu", "npu_swiglu npu_swiglu_backward", when="fp16, bf16, fp32", takes=lambda x: x.dtype in FLOATS)
def _npu(x: Tensor) -> Tensor:
    return torch.ops.npu.npu_swiglu(x, dim=-1)  # type: ignore[no-any-return]


swiglu.compiled_on("cuda")
