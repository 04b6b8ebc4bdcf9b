"""An exponential moving average of the weights, sharded as the masters are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .parallel.shard import Shard


class Average:
    """``average = decay * average + (1 - decay) * master`` after each step, from the weights before the first one.

    It is held in fp32, or in the master's dtype where that is wider.
    """

    def __init__(self, shards: Sequence[Shard], decay: float) -> None:
        self.shards, self.decay = list(shards), decay
        self._values: list[Tensor] = []

    def values(self) -> dict[str, Tensor]:
        """Return the average of each shard by name, which steps update; before the first one it is the masters."""
        if not self._values:
            self._values = [self._wide(s.master).clone() for s in self.shards]
        return {s.name: value for s, value in zip(self.shards, self._values, strict=True)}

    def _wide(self, master: Tensor) -> Tensor:
        return master.detach().to(torch.promote_types(master.dtype, torch.float32))
