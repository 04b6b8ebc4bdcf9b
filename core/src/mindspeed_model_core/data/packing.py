"""From documents to sequences of one length, and from sequences to the flat batch the networks read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..trunk import Batch

IGNORE = -100
Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Packed:
    """One sequence: ``tokens`` and ``labels`` of its length, and the ``lengths`` of the pieces of documents in it."""

    tokens: Tokens
    labels: Tokens
    lengths: tuple[int, ...]


def fill(document: Tokens, offset: int, length: int, following: Callable[[], Tokens]) -> tuple[Packed, Tokens, int]:
    """Return a sequence of ``length`` tokens from ``offset`` in ``document`` on, and where the next one starts.

    ``following()`` gives each next document when one is used up. The label of a position is the next token of its
    document, also across the sequence's end; a document's last token has none. The position returned is a document
    and an offset in it, at most its length.
    """
    tokens, labels = np.empty(length, np.int32), np.empty(length, np.int32)
    lengths: list[int] = []
    at = 0
    while at < length:
        if offset == len(document):
            document, offset = following(), 0
        count = min(length - at, len(document) - offset)
        tokens[at : at + count] = document[offset : offset + count]
        after = document[offset + 1 : offset + count + 1]
        labels[at : at + len(after)] = after
        labels[at + len(after) : at + count] = IGNORE
        lengths.append(count)
        at, offset = at + count, offset + count
    return Packed(tokens, labels, tuple(lengths)), document, offset


def pack(samples: Sequence[Packed]) -> Batch:
    """Return samples as one flat batch: int64 ``tokens``, ``labels``, ``positions`` and the tuple ``lengths``."""
    lengths = tuple(n for sample in samples for n in sample.lengths)
    return {
        "tokens": _flat([s.tokens for s in samples]),
        "labels": _flat([s.labels for s in samples]),
        "positions": torch.cat([torch.arange(n) for n in lengths]),
        "lengths": lengths,
    }


def _flat(rows: list[Tokens]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(rows).astype(np.int64))
