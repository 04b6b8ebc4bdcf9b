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


def _linear_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _loss(x @ weight.T, labels).sum()


CASES = (
    *(
        Case(ops.cross_entropy, f"{n}x{vocabulary}", (draw(n, vocabulary),), _loss, (_labels(n, vocabulary),))
        for n, vocabulary in ((70, 96), (13, 1001), (1, 5), (8, 2), (0, 8))
    ),
    # The second is more than a CPU does at once.
    *(
        Case(
            ops.linear_cross_entropy,
            f"{n}x16, {vocabulary}",
            (draw(n, 16), draw(vocabulary, 16, seed=1)),
            _linear_loss,
            (_labels(n, vocabulary),),
        )
        for n, vocabulary in ((70, 96), (600, 4000), (1, 5), (0, 8))
    ),
)
