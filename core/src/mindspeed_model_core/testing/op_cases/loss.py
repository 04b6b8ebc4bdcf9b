"""Cross entropy, with positions that are ignored."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops
from .case import Case, draw


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    labels = labels.cpu()
    kept = labels != -100
    chance = logits.softmax(-1)[torch.arange(len(labels)), labels.clamp_min(0)]
    return torch.where(kept, -chance.log(), 0)


def _labels(tokens: int, vocabulary: int) -> Tensor:
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens))
    labels[::7] = -100
    return labels


CASES = tuple(
    Case(
        ops.cross_entropy, f"{tokens}x{vocabulary}", (draw(tokens, vocabulary),), _loss, (_labels(tokens, vocabulary),)
    )
    for tokens, vocabulary in ((70, 96), (13, 1001), (1, 5), (8, 2), (0, 8))
)
