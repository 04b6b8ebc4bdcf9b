"""Where a parameter's elements live when tensor parallelism cuts it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Placement:
    """How tensor parallelism holds a parameter: ``dim`` is cut into equal shares, or None for a replica.

    ``parts`` are the sizes along ``dim`` of blocks stacked in one parameter (such as q, k, v), each cut on its own;
    empty means one block. ``unit`` is the smallest run along ``dim`` that must stay whole (a head's width).
    ``partial`` marks a replica whose gradient is only a share of the sum on each rank.
    """

    dim: int | None = None
    parts: tuple[int, ...] = ()
    unit: int = 1
    partial: bool = False

    def pieces(self, size: int, rank: int, ranks: int) -> list[tuple[int, int]]:
        """Return (start, length) in the whole, along ``dim``, of each piece this rank holds, in local order."""
        if self.dim is None or ranks == 1:
            return [(0, size)]
        out, base = [], 0
        for part in self.parts or (size,):
            if part // self.unit % ranks:
                raise ValueError(f"tp={ranks} does not divide {part // self.unit}")
            out.append((base + rank * (part // ranks), part // ranks))
            base += part
        return out

    def narrow(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """Return this rank's share of the whole parameter (a copy when it is in several pieces)."""
        if self.dim is None or ranks == 1:
            return whole
        cuts = [whole.narrow(self.dim, s, n) for s, n in self.pieces(whole.shape[self.dim], rank, ranks)]
        return cuts[0] if len(cuts) == 1 else torch.cat(cuts, self.dim)


REPLICA = Placement()


def placements(net: nn.Module) -> Iterator[tuple[str, Placement]]:
    """Yield every parameter's name and placement, asking each module that declares ``placements()``."""
    for prefix, module in net.named_modules():
        declared = module.placements() if hasattr(module, "placements") else {}
        for name, _ in module.named_parameters(recurse=False):
            yield (f"{prefix}.{name}" if prefix else name), declared.get(name, REPLICA)
