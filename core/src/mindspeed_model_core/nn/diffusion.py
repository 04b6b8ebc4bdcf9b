"""What diffusion transformers are made of: attention normed over its whole width, modulation, patches, time.

Activations are ``[tokens, batch, width]``: tensor and context parallelism share out dim 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.rope import Tables
from ..parallel.context import ContextParallel, ContextShared
from ..parallel.placement import Placement
from ..parallel.tensor import TensorParallel
from .linear import Linear
from .norm import RMSNorm


class WholeAttention(nn.Module, ContextShared):
    """Attention of every token to every other, whoever holds them; what makes q, k and v is a subclass's."""

    def own(self, tables: Tables) -> Tables:
        """Return this rank's part of rotary tables of all tokens, in the order in which ranks hold them."""
        if self.cp is None:
            return tables
        cos, sin = (table.narrow(0, *self.cp.share(len(table))) for table in tables)
        return cos, sin

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Tensor:
        """Return ``[tokens, batch, heads * width]`` of this rank's ``[tokens, batch, heads, width]``.

        q and k are turned; ``tokens`` are those of all ranks.
        """
        if self.cp is not None:
            q, k, v = self.cp.to_heads(torch.stack((q, k, v), 2), tokens).unbind(2)
        y = ops.full_attention(q, k, v)
        if self.cp is not None:
            y = self.cp.to_tokens(y, tokens)
        return y.flatten(-2)


class SelfAttention(WholeAttention):
    """Every token attends to every other; q and k are normed over all heads together, then turned."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.qkv = Linear(width, 3 * width, split="out", parts=(width,) * 3, unit=self.head_dim)
        self.q_norm = RMSNorm(width, eps, unit=self.head_dim)
        self.k_norm = RMSNorm(width, eps, unit=self.head_dim)
        self.out = Linear(width, width, split="in", unit=self.head_dim)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        """Map ``[tokens, batch, width]`` to the same shape; ``tables`` are of all tokens, whoever holds them."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv(x).chunk(3, -1))
        own = self.own(tables)
        q, k = self.q_norm.turned(q, own), self.k_norm.turned(k, own)
        return self.out(self.attend(q, k, v, len(tables[0])))


class CrossAttention(nn.Module):
    """Tokens attend to a text, and apart from it to the ``image`` tokens before it, with the same q; both add up."""

    def __init__(self, width: int, heads: int, eps: float, *, image: bool = False) -> None:
        super().__init__()
        self.head_dim = unit = width // heads
        self.q = Linear(width, width, split="out", unit=unit)
        self.kv = Linear(width, 2 * width, split="out", parts=(width,) * 2, unit=unit, tokens="all")
        self.q_norm, self.k_norm = RMSNorm(width, eps, unit=unit), RMSNorm(width, eps, unit=unit)
        if image:
            self.image_kv = Linear(width, 2 * width, split="out", parts=(width,) * 2, unit=unit, tokens="all")
            self.image_k_norm = RMSNorm(width, eps, unit=unit)
        self.out = Linear(width, width, split="in", unit=unit)

    def forward(self, x: Tensor, others: Tensor, images: int) -> Tensor:
        """Map ``[tokens, batch, width]`` to the same shape; the first ``images`` of ``others`` are image tokens."""
        q = self.q_norm(self.q(x)).unflatten(-1, (-1, self.head_dim))
        y = self._attend(q, self.kv(others[images:]), self.k_norm)
        if images:
            y = y + self._attend(q, self.image_kv(others[:images]), self.image_k_norm)
        return self.out(y.flatten(-2))

    def _attend(self, q: Tensor, kv: Tensor, norm: nn.Module) -> Tensor:
        k, v = kv.chunk(2, -1)
        k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (norm(k), v))
        return ops.full_attention(q, k, v)


class Modulation(nn.Module):
    """A learned table added to what a sample's time step says: ``count`` shifts, scales and gates."""

    tp: TensorParallel | None = None

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(count, width) / width**0.5)

    def placements(self) -> dict[str, Placement]:
        """Return a replica; with sequence parallelism its gradient covers only this rank's tokens."""
        return {"table": Placement(partial=self.tp is not None and self.tp.sequence)}

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        """Return ``count`` tensors ``[batch, width]`` in fp32 or wider from ``time [count or 1, batch, width]``."""
        wide = torch.promote_types(time.dtype, torch.float32)
        return (self.table.to(wide)[:, None] + time.to(wide)).unbind()


class VectorModulation(Linear):
    """``count`` shifts, scales and gates that are a linear map of what a sample's vector says.

    In large networks these maps are a good part of all weights, so tensor parallelism shares out their output.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__(width, count * width, split="out", tokens="all")
        self.count = count

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return ``count`` tensors ``[batch, width]`` of ``[1, batch, width]``, which every rank has."""
        y = super().forward(x)
        if self.tp is not None:
            y = self.tp.gather(y)
            if self.tp.sequence:
                # What follows works on this rank's tokens: its gradient is a share.
                y = self.tp.enter(y, False)
        return y[0].unflatten(-1, (self.count, -1)).unbind(-2)


class Patches(nn.Module):
    """Cuts ``[batch, channels, frames, height, width]`` into patches and projects them: this rank's tokens.

    The features of a patch are ordered channel, frame, row, column, as a convolution of stride ``size`` sees them.
    """

    tp: TensorParallel | None = None

    def __init__(self, channels: int, width: int, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.size = size
        self.proj = Linear(channels * math.prod(size), width)

    def forward(self, x: Tensor, cp: ContextParallel | None) -> Tensor:
        """Return ``[tokens, batch, width]``; tokens go by frame, then row, then column."""
        batch, channels = x.shape[:2]
        t, h, w = self.size
        x = x.view(batch, channels, x.shape[2] // t, t, x.shape[3] // h, h, x.shape[4] // w, w)
        x = x.permute(2, 4, 6, 0, 1, 3, 5, 7).reshape(-1, batch, channels * math.prod(self.size))
        if cp is not None:
            x = x.narrow(0, *cp.share(len(x)))
        if self.proj.tp is not None:
            x = self.proj.tp.own_tokens(x)
        return self.proj(x)


class FinalPatches(nn.Module):
    """Modulated norm and projection back to patches, joined to ``[batch, channels, frames, height, width]``.

    The features of a patch are ordered frame, row, column, channel.
    """

    def __init__(self, width: int, channels: int, size: tuple[int, int, int], eps: float) -> None:
        super().__init__()
        self.size, self.channels, self.eps = size, channels, eps
        self.modulation = Modulation(2, width)
        self.proj = Linear(width, channels * math.prod(size))

    def forward(self, x: Tensor, time: Tensor, grid: tuple[int, int, int], cp: ContextParallel | None) -> Tensor:
        """Map this rank's ``[tokens, batch, width]`` and ``time [1, batch, width]`` to the whole grid's latents."""
        shift, scale = self.modulation(time)
        x = self.proj(ops.adaln(x, shift, scale, self.eps))
        if self.proj.tp is not None:
            x = self.proj.tp.all_tokens(x)
        if cp is not None:
            x = cp.gather(x, math.prod(grid))
        frames, rows, columns = grid
        t, h, w = self.size
        x = x.view(frames, rows, columns, -1, t, h, w, self.channels).permute(3, 7, 0, 4, 1, 5, 2, 6)
        return x.reshape(-1, self.channels, frames * t, rows * h, columns * w)


class TimeEmbedding(nn.Module):
    """The diffusion time as sinusoids (cosines first) through two layers, and from that the blocks' modulations.

    All of it is in fp32 or wider, whatever the weights are in, as in the original release: it scales every token.
    """

    def __init__(self, frequencies: int, width: int, modulations: int) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.up = Linear(frequencies, width, tokens="none")
        self.out = Linear(width, width, tokens="none")
        self.modulations = Linear(width, modulations * width, tokens="none")

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``[1, batch, width]`` and ``[modulations, batch, width]`` for ``time [batch]`` from 0 to 1000."""
        waves = sinusoids(time, self.frequencies)
        waves = waves.to(torch.promote_types(self.up.weight.dtype, torch.float32))
        embedded = self.out(F.silu(self.up(waves)))
        parts = self.modulations(F.silu(embedded)).unflatten(-1, (-1, embedded.shape[-1]))
        return embedded[None], parts.movedim(1, 0)


def sinusoids(time: Tensor, count: int) -> Tensor:
    """Return ``[batch, count]`` cosines, then sines, of ``time [batch]`` from 0 to 1000, in fp32 or wider."""
    wide = torch.promote_types(time.dtype, torch.float32)
    half = count // 2
    steps = torch.arange(half, device=time.device, dtype=wide)
    angle = time.to(wide)[:, None] * torch.exp(-math.log(10000) * steps / half)
    return torch.cat((angle.cos(), angle.sin()), -1)
