"""The network: a neural n-gram model (Bengio et al. 2003, JMLR 3) with residual blocks, on core's layers."""

from __future__ import annotations

import torch
from mindspeed_model_core import nn as layers
from mindspeed_model_core.trunk import Batch, Context, State, Trunk
from torch import Tensor, nn

from .config import TemplateConfig


class Block(nn.Module):
    """Pre-norm feed-forward, added to its input."""

    def __init__(self, config: TemplateConfig) -> None:
        super().__init__()
        self.norm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = layers.SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[tokens, hidden]`` to the same shape."""
        return x + self.mlp(self.norm(x))


class Template(Trunk):
    """One vector per byte and distance, added up over the window; blocks; norm and vocabulary head.

    The batch holds ``before``, int64 ``[window, tokens]``: the bytes before each position, the nearest first; and, to
    get losses instead of logits, ``labels``, int64 ``[tokens]``.
    """

    first = ("table",)
    last = ("norm", "head")
    compiles = True

    def __init__(self, config: TemplateConfig) -> None:
        super().__init__()
        self.config = config
        self.table = layers.Embedding(config.window * config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = layers.VocabHead(config.hidden_size, config.vocab_size)

    def context(self, batch: Batch) -> Context:
        """Return the labels."""
        return {"labels": batch.get("labels")}

    def embed(self, batch: Batch, context: Context) -> State:
        """Return the sum of the window's vectors."""
        rows = batch["before"]
        vectors = [self.table(row + distance * self.config.vocab_size) for distance, row in enumerate(rows)]
        return {"x": torch.stack(vectors).sum(0)}

    def step(self, index: int, block: nn.Module, state: State, context: Context) -> State:
        """Run one block."""
        return {"x": block(state["x"])}

    def finish(self, state: State, context: Context) -> Tensor:
        """Return logits ``[tokens, vocab]``, or with labels the sum of their losses."""
        return self.head(self.norm(state["x"]), context["labels"])

    def tokens(self, batch: Batch) -> int:
        """Return the rows that go through the blocks."""
        return int(batch["before"].shape[1])

    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """Return the activations' shape; sequence parallelism keeps this rank's share of the tokens."""
        return {"x": (self.held(batch), self.config.hidden_size)}

    def initialise(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        """Norms start at one, matrices at a normal of ``initializer_range``."""
        if name.endswith("norm.weight"):
            weight.fill_(1)
        else:
            weight.normal_(0, self.config.initializer_range, generator=generator)
