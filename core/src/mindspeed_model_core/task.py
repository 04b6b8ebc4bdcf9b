"""What a model is trained to do: the objective, its data and how work is counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from .trunk import Batch

Unit = Literal["samples", "frames", "tokens"]


@dataclass(frozen=True)
class Work:
    """What one batch amounts to: samples, units of the task (tokens, frames) and model FLOPs of a training step."""

    samples: int
    units: int
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.samples + other.samples, self.units + other.units, self.flops + other.flops)


class Loader(Protocol):
    """Yields, for one data rank, the list of micro-batches of each optimizer step; its position can be saved."""

    def __iter__(self) -> Iterator[list[Batch]]: ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last step yielded: JSON values; merging all data ranks' dicts is the whole."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a merged position, under any number of data ranks."""
        ...


class Task(Protocol):
    """A training objective. ``loss`` returns a sum; the trainer divides by the count over all data ranks."""

    unit: Unit

    def data(self, rank: int, ranks: int) -> Loader:
        """Open the recipe's dataset for data rank ``rank`` of ``ranks``."""
        ...

    def synthetic(self, rank: int, ranks: int) -> Loader:
        """Return endless random batches of the recipe's shapes, for ``measure``."""
        ...

    def encode(self, batch: Batch) -> Batch:
        """Run frozen encoders, on the device, without gradient; return the batch the network reads."""
        ...

    def count(self, batch: Batch) -> int:
        """Return how many terms the batch's loss sum has."""
        ...

    def work(self, batch: Batch) -> Work:
        """Return the batch's samples, units and model FLOPs (forward and backward, no recomputation)."""
        ...

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the scalar sum of the loss terms of a batch."""
        ...
