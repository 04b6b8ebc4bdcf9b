"""The Llama-2 network (Touvron et al. 2023, arXiv:2307.09288): single-device code on core's layers."""

from __future__ import annotations

import torch
from mindspeed_model_core import nn as layers
from mindspeed_model_core import ops
from mindspeed_model_core.trunk import Batch, Context, State, Trunk
from torch import Tensor, nn

from .config import Llama2Config


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to its input."""

    def __init__(self, config: Llama2Config) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_norm = layers.RMSNorm(width, eps)
        self.attention = layers.Attention(width, config.num_attention_heads, config.num_key_value_heads)
        self.post_attention_norm = layers.RMSNorm(width, eps)
        self.mlp = layers.SwiGLU(width, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        lengths: tuple[int, ...],
        cache: tuple[layers.KVCache, int] | None = None,
    ) -> Tensor:
        """Map ``[tokens, hidden]`` to the same shape."""
        y = self.attention(self.input_norm(x), tables, lengths, cache)
        y, x = self.post_attention_norm.add(y, x)
        return x + self.mlp(y)


class Llama2(Trunk):
    """Token embedding, decoder blocks, norm and vocabulary head.

    The batch holds ``tokens`` and ``positions`` (int64 ``[tokens]``) of documents packed back to back, ``lengths`` of
    the documents, and, to get their loss instead of logits, ``labels``; to generate, a ``cache``.
    """

    first = ("embed_tokens",)
    last = ("norm", "head")
    compiles = True

    def __init__(self, config: Llama2Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = layers.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = layers.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = layers.VocabHead(config.hidden_size, config.vocab_size)

    def context(self, batch: Batch) -> Context:
        """Return rotary tables, document lengths, labels and the cache."""
        tables = ops.rope_tables(batch["positions"], self.config.head_dim, self.config.rope_theta)
        return {"tables": tables, **{key: batch.get(key) for key in ("lengths", "labels", "cache")}}

    def embed(self, batch: Batch, context: Context) -> State:
        """Return token embeddings."""
        return {"x": self.embed_tokens(batch["tokens"])}

    def step(self, index: int, block: nn.Module, state: State, context: Context) -> State:
        """Run one block."""
        cache = None if context["cache"] is None else (context["cache"], index)
        return {"x": block(state["x"], context["tables"], context["lengths"], cache)}

    def finish(self, state: State, context: Context) -> Tensor:
        """Return logits ``[tokens, vocab]``, or with labels the sum of their losses."""
        if (cache := context["cache"]) is not None:
            cache.advance(len(context["tables"][0]) // cache.batch)
        return self.head(self.norm(state["x"]), context["labels"])

    def constants(self, context: Context) -> tuple[int, ...] | None:
        """Return how many documents there are and their length, if they have one and nothing is generated."""
        lengths = context["lengths"]
        alike = context["cache"] is None and len(set(lengths)) == 1
        return (len(lengths), lengths[0]) if alike else None

    def tokens(self, batch: Batch) -> int:
        """Return the tokens of all documents."""
        return len(batch["tokens"])

    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """Return the activations' shape; sequence parallelism keeps this rank's share of the tokens."""
        return {"x": (self.held(batch), self.config.hidden_size)}

    def initialise(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        """Norms start at one, matrices at a normal of ``initializer_range``."""
        if name.endswith("norm.weight"):
            weight.fill_(1)
        else:
            weight.normal_(0, self.config.initializer_range, generator=generator)
