"""What the processes of a job tell each other about data, so that all see the same; one alone tells itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import UserError

_READERS = 8  # files that a process looks at at once

T = TypeVar("T")
R = TypeVar("R")


def gather(value: T) -> list[T]:
    """Return every process's plain value, by rank; all processes must call this."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def agree(name: str, value: object) -> None:
    """Raise UserError, the same on all ranks, unless all have one value of what a user knows as ``name``."""
    first, *others = gather(value)
    for rank, other in enumerate(others, 1):
        if other != first:
            raise UserError(f"{name}: is {other} on rank {rank} and {first} on rank 0; give all hosts the same data")


def spread(look: Callable[[T], R], items: Sequence[T]) -> list[R | UserError]:
    """Return what ``look`` finds of each item, or the UserError it raises; ranks share out the items, all get all.

    Looking once is not only faster: a file that one host cannot read is then bad on all of them. What else is raised
    on one rank is raised on all, so that none waits for it.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def found(item: T) -> R | Exception:
        try:
            return look(item)
        except Exception as error:
            return error

    with ThreadPoolExecutor(_READERS) as pool:
        shares: list[Any] = gather(list(pool.map(found, items[rank::world])))
    for share in shares:
        for each in share:
            if isinstance(each, Exception) and not isinstance(each, UserError):
                raise each
    return [shares[number % world][number // world] for number in range(len(items))]
