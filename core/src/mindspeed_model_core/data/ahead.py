"""Work that goes ahead of its use, in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(given: Iterable[T], function: Callable[[T], R], count: int) -> Iterator[R]:
    """Yield ``function`` of each in order, with at most ``count`` of them made and not yet asked for."""
    pool = ThreadPoolExecutor(1)
    try:
        waiting: deque[Future[R]] = deque()
        for each in given:
            waiting.append(pool.submit(function, each))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # a job that is stopped has held samples to write first
