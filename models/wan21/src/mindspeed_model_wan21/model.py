"""The Wan2.1 diffusion transformer (Wan team 2025, arXiv:2503.20314): single-device code on core's layers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from mindspeed_model_core import nn as layers
from mindspeed_model_core import ops
from mindspeed_model_core.ops.rope import Tables
from mindspeed_model_core.trunk import Batch, Context, State, Trunk
from torch import Tensor, nn

from .config import Wan21Config

TEXT_TOKENS = 512
"""The length of every text: shorter ones end in zeros, which the network was trained to see."""


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward; the first and last are modulated by the time step."""

    def __init__(self, config: Wan21Config) -> None:
        super().__init__()
        width, heads, self.eps = config.width, config.num_attention_heads, config.eps
        self.modulation = layers.Modulation(6, width)
        self.self_attention = layers.SelfAttention(width, heads, config.eps)
        self.cross_norm = layers.LayerNorm(width, config.eps)
        self.cross_attention = layers.CrossAttention(width, heads, config.eps, image=config.image_dim is not None)
        self.mlp = layers.FeedForward(width, config.ffn_dim)

    def forward(self, x: Tensor, times: Tensor, others: Tensor, tables: Tables, images: int) -> Tensor:
        """Map ``x [tokens, batch, width]``, given ``times [6, batch, width]`` and text and image tokens ``others``."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(times)
        y = self.self_attention(ops.adaln(x, shift, scale, self.eps), tables)
        x = ops.gated_add(x, y, gate)
        x = x + self.cross_attention(self.cross_norm(x), others, images)
        return ops.gated_add(x, self.mlp(ops.adaln(x, mlp_shift, mlp_scale, self.eps)), mlp_gate)


class TextEmbedding(nn.Module):
    """Projects the text encoder's output; every rank has all of the text."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.up = layers.Linear(text_dim, width, tokens="all")
        self.out = layers.Linear(width, width, tokens="all")

    def forward(self, text: Tensor) -> Tensor:
        """Map ``[text, batch, text_dim]`` to ``[text, batch, width]``."""
        return self.out(F.gelu(self.up(text), approximate="tanh"))


class ImageEmbedding(nn.Module):
    """Projects the image encoder's tokens of the first frame, or with learned positions of first and last."""

    def __init__(self, image_dim: int, width: int, positions: int | None) -> None:
        super().__init__()
        self.positions = None if positions is None else nn.Parameter(torch.zeros(positions, image_dim))
        self.norm = layers.LayerNorm(image_dim, tokens="all")
        self.up = layers.Linear(image_dim, image_dim, tokens="all")
        self.out = layers.Linear(image_dim, width, tokens="all")
        self.out_norm = layers.LayerNorm(width, tokens="all")

    def forward(self, image: Tensor) -> Tensor:
        """Map ``[image tokens, batch, image_dim]`` to ``[image tokens, batch, width]``."""
        if self.positions is not None:
            image = image + self.positions[:, None]
        return self.out_norm(self.out(F.gelu(self.up(self.norm(image)))))


class Wan21(Trunk):
    """Patches, time, text and image embedding, blocks, projection back to latents.

    The batch holds ``x [batch, in_channels, frames, height, width]``, ``time [batch]`` from 0 to 1000,
    ``text [batch, 512, text_dim]`` and, for image-to-video, ``image [batch, tokens, image_dim]``. Returns the
    predicted velocity ``[batch, out_channels, frames, height, width]``.
    """

    last = ("head",)
    compiles = True

    def __init__(self, config: Wan21Config) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patches = layers.Patches(config.in_channels, width, config.patch_size)
        self.time = layers.TimeEmbedding(config.freq_dim, width, 6)
        self.text = TextEmbedding(config.text_dim, width)
        self.first = ("patches", "time", "text")
        if config.image_dim is not None:
            self.image = ImageEmbedding(config.image_dim, width, config.pos_embed_seq_len)
            self.first += ("image",)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = layers.FinalPatches(width, config.out_channels, config.patch_size, config.eps)

    def _grid(self, batch: Batch) -> tuple[int, int, int]:
        t, h, w = (size // patch for size, patch in zip(batch["x"].shape[2:], self.config.patch_size, strict=True))
        return t, h, w

    def context(self, batch: Batch) -> Context:
        """Return the grid of tokens, its rotary tables and the number of image tokens."""
        grid = self._grid(batch)
        tables = ops.grid_rope_tables(grid, self.config.rope_dims, 10000.0, batch["x"].device)
        return {"grid": grid, "tables": tables, "images": batch["image"].shape[1] if "image" in batch else 0}

    def embed(self, batch: Batch, context: Context) -> State:
        """Return the tokens, the time step's embedding and modulations, and what the tokens attend to."""
        kind = self.patches.proj.weight.dtype
        time, times = self.time(batch["time"])
        others = self.text(batch["text"].to(kind).transpose(0, 1))
        if context["images"]:
            others = torch.cat((self.image(batch["image"].to(kind).transpose(0, 1)), others))
        return {"x": self.patches(batch["x"].to(kind), self.cp), "time": time, "times": times, "others": others}

    def step(self, index: int, block: nn.Module, state: State, context: Context) -> State:
        """Run one block."""
        x = block(state["x"], state["times"], state["others"], context["tables"], context["images"])
        return {**state, "x": x}

    def finish(self, state: State, context: Context) -> Tensor:
        """Return the velocity of all tokens, on every rank."""
        return self.head(state["x"], state["time"], context["grid"], self.cp)

    def tokens(self, batch: Batch) -> int:
        """Return the tokens of a clip."""
        return math.prod(self._grid(batch))

    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """Return the State's shapes; this rank holds its share of the tokens and all of the rest."""
        size, width = len(batch["x"]), self.config.width
        others = batch["text"].shape[1] + (batch["image"].shape[1] if "image" in batch else 0)
        rows = {"x": self.held(batch), "time": 1, "times": 6, "others": others}
        return {name: (count, size, width) for name, count in rows.items()}

    def initialise(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        """Start as the original does: the head at zero, embeddings at 0.02, other matrices by Xavier's rule."""
        if name.endswith("modulation.table"):
            weight.normal_(0, self.config.width**-0.5, generator=generator)
        elif name.endswith("norm.weight"):
            weight.fill_(1)
        elif weight.dim() == 1 or name.startswith("head.") or name == "image.positions":
            weight.zero_()
        elif name.startswith(("text.", "time.")):
            weight.normal_(0, 0.02, generator=generator)
        else:
            # The patches' and stacked projections' published rule is that of each alone: rows are outputs.
            parts = {"qkv": 3, "kv": 2, "image_kv": 2}.get(name.split(".")[-2], 1)
            bound = (6 / (weight.shape[1] + weight.shape[0] / parts)) ** 0.5
            weight.uniform_(-bound, bound, generator=generator)
