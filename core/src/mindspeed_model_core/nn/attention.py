"""Self-attention with grouped key/value heads, rotary positions and an optional cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .linear import Linear


class KVCache:
    """Keys and values of the tokens seen so far, for ``batch`` sequences that grow together.

    One pair of ``[batch, capacity, kv_heads, width]`` tensors per block. A network run appends to every block, then
    ``length`` grows by the number of new positions.
    """

    def __init__(
        self, blocks: int, kv_heads: int, width: int, capacity: int, *, batch: int, device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        shape = (blocks, 2, batch, capacity, kv_heads, width)
        self.store = torch.empty(shape, device=device, dtype=dtype)
        self.length, self.batch, self.capacity = 0, batch, capacity

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        self.length = min(self.length, length)

    def advance(self, count: int) -> None:
        """Count ``count`` new positions, once all blocks have stored them."""
        self.length += count

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values ``[batch, new, kv_heads, width]``; return all of the block's."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {end} are needed")
        keys, values = self.store[block]
        keys[:, self.length : end], values[:, self.length : end] = k, v
        return keys[:, :end], values[:, :end]


class Attention(nn.Module):
    """Causal self-attention over packed documents; q, k and v come from one projection."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        q, kv = heads * self.head_dim, kv_heads * self.head_dim
        self.ratio = heads // kv_heads
        self.qkv = Linear(width, q + 2 * kv, bias=False, split="out", parts=(q, kv, kv), unit=self.head_dim)
        self.out = Linear(q, width, bias=False, split="in", unit=self.head_dim)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        lengths: tuple[int, ...],
        cache: tuple[KVCache, int] | None = None,
    ) -> Tensor:
        """Map ``[tokens, width]`` to the same shape; ``cache`` is a KVCache and this block's number in it."""
        mixed = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        kv = mixed.shape[1] // (self.ratio + 2)
        q, k, v = ops.rope_projected_(mixed, *tables, kv)
        y = ops.attention(q, k, v, lengths) if cache is None else _attend_cached(q, k, v, *cache)
        return self.out(y.flatten(1))


def _attend_cached(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, block: int) -> Tensor:
    q, k, v = (x.unflatten(0, (cache.batch, -1)) for x in (q, k, v))
    keys, values = cache.extend(block, k, v)
    new, held = q.shape[1], keys.shape[1]
    mask = torch.ones(new, held, dtype=torch.bool, device=q.device).tril(held - new) if new > 1 else None
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != keys.shape[1])
    return out.transpose(1, 2).flatten(0, 1)
