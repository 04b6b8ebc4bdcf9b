"""Both ends of a language model: token embedding and vocabulary head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..parallel.placement import Placement
from ..parallel.tensor import TensorParallel


class Embedding(nn.Embedding):
    """A table of vectors; tensor parallelism shares out its rows."""

    tp: TensorParallel | None = None

    def placements(self) -> dict[str, Placement]:
        """Return the rows' placement."""
        return {"weight": Placement(0)}

    def forward(self, tokens: Tensor) -> Tensor:
        """Map int64 ``[tokens]`` to ``[tokens, width]`` (this rank's tokens, with sequence parallelism)."""
        if self.tp is None:
            return F.embedding(tokens, self.weight)
        return self.tp.embed(tokens, self.weight)


class TiedVocab(Embedding):
    """A table of vectors that is also the last projection (Press and Wolf 2017, arXiv:1608.05859)."""

    def head(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``[tokens, vocab]`` logits, or the sum of the tokens' losses, in fp32 or wider."""
        return _predict(x, self.weight, labels, self.tp)


class VocabHead(nn.Module):
    """The last projection: logits without labels, the sum of the tokens' negative log-likelihoods with them."""

    tp: TensorParallel | None = None

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(width, vocab, bias=False).weight.detach())

    def placements(self) -> dict[str, Placement]:
        """Return the vocabulary rows' placement."""
        return {"weight": Placement(0)}

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return ``[tokens, vocab]`` logits, or the sum of the tokens' losses, in fp32 or wider."""
        return _predict(x, self.weight, labels, self.tp)


def _predict(x: Tensor, weight: Tensor, labels: Tensor | None, tp: TensorParallel | None) -> Tensor:
    if tp is None:
        return ops.linear(x, weight) if labels is None else ops.linear_cross_entropy(x, weight, labels)
    logits = tp.column(x, weight, None, tp.sequence)
    if labels is None:
        return tp.gather(logits)
    return ops.cross_entropy(logits, labels, start=tp.rank * weight.shape[0], group=tp.group).sum()
