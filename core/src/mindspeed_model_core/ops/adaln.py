"""Adaptive layer norm: shift, scale and gate that depend on the sample (Peebles and Xie 2022, arXiv:2212.09748).

``x`` and ``y`` are ``[tokens, batch, width]``, modulations ``[batch, width]``; sums are in the wider dtype of the two.
"""

from __future__ import annotations

from torch import Tensor

from .norm import FUSED_WIDTH, FusedLayerNorm, fuses_layer_norm, layer_norm
from .table import op


@op
def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return ``layer_norm(x) * (1 + scale) + shift`` in ``x``'s dtype; the norm has no parameters of its own."""
    return (layer_norm.reference(x, None, None, eps) * (1 + scale) + shift).to(x.dtype)


@op
def gated_add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return ``x + y * gate`` in ``x``'s dtype."""
    return (x + y * gate).to(x.dtype)


@adaln.on(
    "cuda",
    "triton",
    when=f"fp16, bf16, fp32, modulations of any of these; {FUSED_WIDTH}",
    takes=lambda x, shift, scale, eps: (
        x.dim() <= 3 and fuses_layer_norm(x, scale, shift) and scale.shape == x.shape[1:]
    ),
)
def _fused(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return FusedLayerNorm.apply(x, scale, shift, eps, 1.0)  # type: ignore[no-any-return]


# torch_npu has no fused op that takes modulations of another type than x: there, both are what PyTorch makes of them.
adaln.compiled_on("cuda")
gated_add.compiled_on("cuda")
