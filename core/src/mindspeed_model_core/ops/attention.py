"""Scaled dot-product attention: over documents packed back to back, and of every token to every other."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], *, causal: bool = True) -> Tensor:
    """Attend within each document; scores are scaled by 1/sqrt(head width), softmax is in fp32 or wider.

    ``q`` is ``[tokens, heads, width]``, ``k`` and ``v`` are ``[tokens, kv_heads, width]``; ``heads`` is a multiple of
    ``kv_heads`` and ``lengths`` sums to ``tokens``. Returns ``[tokens, heads, width]``.
    """
    if len(set(lengths)) == 1:
        return _equal(q, k, v, len(lengths), causal)
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and _varlen() is not None:
        return _packed(q, k, v, lengths, causal)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_equal(a, b, c, 1, causal) for a, b, c in parts])


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from each of ``q [tokens, batch, heads, width]`` to all of ``k``, ``v`` ``[others, batch, heads, width]``.

    Scores are scaled by 1/sqrt(width), softmax is in fp32 or wider. Returns ``q``'s shape.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.permute(2, 0, 1, 3)


@functools.cache
def _varlen() -> Any:
    """Return PyTorch's variable-length flash attention; None before 2.10. Importing it takes seconds."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _equal(q: Tensor, k: Tensor, v: Tensor, documents: int, causal: bool) -> Tensor:
    a, b, c = (x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(a, b, c, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def _packed(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], causal: bool) -> Tensor:
    ends = torch.tensor((0, *lengths)).cumsum(0).to(device=q.device, dtype=torch.int32, non_blocking=True)
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    longest = max(lengths)
    window = (-1, 0) if causal else (-1, -1)
    return _varlen()(q, k, v, ends, ends, longest, longest, window_size=window)
