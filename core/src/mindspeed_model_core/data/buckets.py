"""Samples of many shapes in micro-batches of one: aspect and length buckets, and an order that resumes exactly."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .media import Clip, probe
from .shuffle import shuffled
from .slots import Drawn, Position

SMALLEST = 16
"""Pixels along a side below which a file shows nothing."""


class Bucket(NamedTuple):
    """The shape that clips are brought to."""

    height: int
    width: int
    frames: int


def aspect_buckets(area: int, multiple: int, ratios: Iterable[float]) -> tuple[tuple[int, int], ...]:
    """Return a (height, width) of about ``area`` pixels for each ratio of width to height.

    Sides are multiples of ``multiple``; ratios that come out alike give one size.
    """
    sizes: dict[tuple[int, int], None] = {}
    for ratio in ratios:
        width = max(1, round(math.sqrt(area * ratio) / multiple)) * multiple
        height = max(1, round(math.sqrt(area / ratio) / multiple)) * multiple
        sizes[height, width] = None
    return tuple(sizes)


def choose(
    width: int, height: int, frames: int, sizes: Sequence[tuple[int, int]], lengths: Sequence[int]
) -> Bucket | None:
    """Return the bucket of a clip: the size nearest in aspect, and the longest of ``lengths`` that it fills.

    An image (1 frame) fits the length 1. None: the clip is shorter than every length.
    """
    filled = [length for length in lengths if length <= frames]
    if not filled:
        return None
    aspect = width / height
    nearest = min(sizes, key=lambda size: abs(math.log(aspect * size[0] / size[1])))
    return Bucket(*nearest, max(filled))


def probe_fit(path: str | Path) -> Clip:
    """Return what a file of images is; UserError for one too small to learn or draw from."""
    clip = probe(path)
    if min(clip.width, clip.height) < SMALLEST:
        raise UserError(f"{path}: is {clip.width} x {clip.height} pixels, the least is {SMALLEST} along a side")
    return clip


def fit(path: str | Path, sizes: Sequence[tuple[int, int]], lengths: Sequence[int], fps: float) -> Bucket:
    """Return the bucket of a file when sampled at ``fps``; UserError for one that cannot be used."""
    clip = probe_fit(path)
    length = clip.length(fps)
    bucket = choose(clip.width, clip.height, length, sizes, lengths)
    if bucket is None:
        raise UserError(f"{path}: fills {length} frames at {fps:g} fps, the shortest length is {min(lengths)}")
    return bucket


class BucketSource:
    """A ``slots.Source`` whose every micro-batch holds samples of one bucket, and whose epochs hold every sample.

    ``keys`` gives each sample's bucket; ``read(index, seed)`` returns a sample, or None for a bad one, whose place the
    next of its bucket takes. In each epoch the samples of a bucket are shuffled and cut into groups of ``micro_batch``,
    the last filled up from the first; then the groups of all buckets are shuffled. Slot s at its k-th draw takes member
    ``s % micro_batch`` of group ``k * (global_batch / micro_batch) + s // micro_batch``, counted through epochs
    without end, so that the order depends on no number of ranks or workers. A position is the number of draws and,
    after the first, the index last drawn, which tells whether ranks that share a batch drew the same. The seed follows
    from the recipe's, the epoch, the group's place and the member: what is drawn from it is the same under every
    layout. Raises UserError for no samples, or a global batch that does not divide.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        read: Callable[[int, int], Any],
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
    ) -> None:
        if not keys:
            raise UserError("the data holds no samples that can be used")
        if global_batch % micro_batch:
            raise UserError(f"global_batch={global_batch}: must be a multiple of micro_batch={micro_batch}")
        self.read, self.seed, self.micro_batch = read, seed, micro_batch
        self.groups_per_step = global_batch // micro_batch
        members: dict[Hashable, list[int]] = {}
        for index, key in enumerate(keys):
            members.setdefault(key, []).append(index)
        self.names = list(members)
        self.members = [np.array(indices) for indices in members.values()]
        self.ends = list(accumulate(-(-len(indices) // micro_batch) for indices in self.members))

    @property
    def groups(self) -> int:
        """Return how many micro-batches an epoch has."""
        return self.ends[-1]

    def start(self, slot: int) -> Position:
        """Return where a slot begins."""
        return [0]

    def stream(self, slot: int, position: Position) -> Iterator[Drawn]:
        """Yield (sample, position after it) without end, from ``position`` on."""
        draws = position[0]
        while True:
            group = draws * self.groups_per_step + slot // self.micro_batch
            draws += 1
            sample, index = self._draw(*divmod(group, self.groups), slot % self.micro_batch)
            yield sample, [draws, index]

    def order(self, epoch: int, place: int, member: int) -> tuple[int, int, int]:
        """Return (bucket, place in the bucket's order, index) of a member of the group at ``place`` in an epoch."""
        group = shuffled(place, self.groups, self.seed, epoch)
        bucket = bisect_right(self.ends, group)
        first = self.ends[bucket - 1] if bucket else 0
        at = (group - first) * self.micro_batch + member
        return bucket, at, self._index(bucket, at, epoch)

    def _index(self, bucket: int, at: int, epoch: int) -> int:
        indices = self.members[bucket]
        # Each bucket in an order of its own: a seed shared with another of the same size would repeat its order.
        return int(indices[shuffled(at % len(indices), len(indices), _number(self.seed, "bucket", bucket), epoch)])

    def _draw(self, epoch: int, place: int, member: int) -> tuple[Any, int]:
        bucket, at, _ = self.order(epoch, place, member)
        seed = _number(self.seed, epoch, place, member)
        for further in range(len(self.members[bucket])):
            index = self._index(bucket, at + further, epoch)
            sample = self.read(index, seed)
            if sample is not None:
                return sample, index
        raise UserError(f"none of the {len(self.members[bucket])} samples of bucket {self.names[bucket]} can be read")


def _number(*parts: object) -> int:
    """Return 63 bits that follow from ``parts``."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
