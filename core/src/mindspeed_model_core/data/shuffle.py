"""A shuffled order of any length that costs no memory."""

from __future__ import annotations

import hashlib
from functools import lru_cache

_ROUNDS = 6
_MASK = 2**64 - 1


def shuffled(position: int, size: int, seed: int, epoch: int, window: int | None = None) -> int:
    """Return which of ``size`` items stands at ``position`` in the order that ``seed``, ``epoch``, ``window`` decide.

    A Feistel network over the next power of four, walked until it lands inside ``size`` (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"): a bijection, equal on every machine and version of every library.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, keys = (1 << half) - 1, _keys(f"{seed}/{epoch}" if window is None else f"{seed}/{epoch}/{window}")
    while True:
        left, right = position >> half, position & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        position = left << half | right
        if position < size:
            return position


@lru_cache(maxsize=1024)
def _keys(name: str) -> tuple[int, ...]:
    digest = b"".join(hashlib.sha256(f"{name}/{i}".encode()).digest()[:8] for i in range(_ROUNDS))
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _mix(x: int) -> int:
    """Scramble 64 bits (the finaliser of SplitMix64)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
