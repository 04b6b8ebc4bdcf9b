"""The order of an epoch's documents: a function of seed and epoch alone, and one that can be read fast enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .shuffle import shuffled

WINDOW = 128 * 2**20
"""Bytes of successive groups inside which documents are shuffled; saved positions depend on it."""
_PLANS = 4


@dataclass(frozen=True)
class Group:
    """Successive documents that are read together: how many, and how many bytes that brings into memory."""

    documents: int
    nbytes: int


@dataclass(frozen=True)
class _Plan:
    """One epoch: the groups in their order, the places where each and where each window ends."""

    groups: list[int]
    ends: np.ndarray
    windows: np.ndarray


class Order:
    """Which of ``size`` documents stands at a place of an epoch; ``seed`` None keeps the files' order.

    Without ``groups`` any document can be read alone, and all are shuffled together: one window. With them the groups
    are shuffled, and documents inside windows of successive groups of about ``WINDOW`` bytes: what is read together is
    used together.
    """

    def __init__(self, size: int, groups: Sequence[Group] | None, seed: int | None) -> None:
        self.size, self.groups, self.seed = size, groups, seed
        self.starts = np.cumsum([0, *(group.documents for group in groups or ())])
        self.plans: dict[int, _Plan] = {}

    def document(self, epoch: int, place: int) -> int:
        """Return the number of the document at a place."""
        if self.groups is None:
            return place if self.seed is None else shuffled(place, self.size, self.seed, epoch)
        plan = self._plan(epoch)
        if self.seed is not None:
            window = int(np.searchsorted(plan.windows, place, "right"))
            start, end = int(plan.windows[window - 1]) if window else 0, int(plan.windows[window])
            place = start + shuffled(place - start, end - start, self.seed, epoch, window)
        at = int(np.searchsorted(plan.ends, place, "right"))
        return int(self.starts[plan.groups[at]]) + place - (int(plan.ends[at - 1]) if at else 0)

    def window_end(self, epoch: int, place: int) -> int:
        """Return the place after the last of the window that ``place`` is in."""
        if self.groups is None:
            return self.size
        windows = self._plan(epoch).windows
        return int(windows[np.searchsorted(windows, place, "right")])

    def _plan(self, epoch: int) -> _Plan:
        if epoch not in self.plans:
            while len(self.plans) >= _PLANS:
                del self.plans[min(self.plans)]
            self.plans[epoch] = self._make(epoch)
        return self.plans[epoch]

    def _make(self, epoch: int) -> _Plan:
        assert self.groups is not None
        count = len(self.groups)
        order = (
            list(range(count)) if self.seed is None else [shuffled(i, count, self.seed, epoch) for i in range(count)]
        )
        ends = np.cumsum([self.groups[i].documents for i in order])
        windows, held = [], 0
        for at, number in enumerate(order):
            nbytes = self.groups[number].nbytes
            if held and held + nbytes > WINDOW:
                windows.append(ends[at - 1])
                held = 0
            held += nbytes
        return _Plan(order, ends, np.array([*windows, ends[-1]]))
