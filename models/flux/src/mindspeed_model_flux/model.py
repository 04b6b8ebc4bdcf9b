"""The FLUX.1 diffusion transformer (Black Forest Labs 2024): single-device code on core's layers."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from mindspeed_model_core import nn as layers
from mindspeed_model_core import ops
from mindspeed_model_core.ops.rope import Tables
from mindspeed_model_core.parallel.tensor import even_share
from mindspeed_model_core.trunk import Batch, Context, State, Trunk
from torch import Tensor, nn

from .config import PATCH, FluxConfig

EPS = 1e-6
FREQUENCIES = 256
THETA = 10000.0
TIMES = 1000.0
"""What guidance is multiplied by before it becomes sinusoids; time comes multiplied."""


class JointAttention(layers.WholeAttention):
    """Text and image tokens attend to all of both; each stream has projections and norms of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        cut: dict[str, Any] = {"split": "out", "parts": (width,) * 3, "unit": self.head_dim}
        self.qkv, self.text_qkv = layers.Linear(width, 3 * width, **cut), layers.Linear(width, 3 * width, **cut)
        self.q_norm, self.k_norm = layers.HeadNorm(self.head_dim, EPS), layers.HeadNorm(self.head_dim, EPS)
        self.text_q_norm, self.text_k_norm = layers.HeadNorm(self.head_dim, EPS), layers.HeadNorm(self.head_dim, EPS)
        self.out = layers.Linear(width, width, split="in", unit=self.head_dim)
        self.text_out = layers.Linear(width, width, split="in", unit=self.head_dim)

    def forward(self, text: Tensor, image: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """Map both ``[tokens, batch, width]`` to the same shapes; ``tables`` are of all text, then all image tokens."""
        text, image = self.text_qkv(text), self.qkv(image)
        texts, own = len(text), self.own(tables)
        of_text = self._heads(text, self.text_q_norm, self.text_k_norm, (own[0][:texts], own[1][:texts]))
        of_image = self._heads(image, self.q_norm, self.k_norm, (own[0][texts:], own[1][texts:]))
        q, k, v = (torch.cat(pair) for pair in zip(of_text, of_image, strict=True))
        y = self.attend(q, k, v, len(tables[0]))
        return self.text_out(y[:texts]), self.out(y[texts:])

    def _heads(
        self, qkv: Tensor, q_norm: layers.HeadNorm, k_norm: layers.HeadNorm, tables: Tables
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv.chunk(3, -1))
        return q_norm.turned(q, tables), k_norm.turned(k, tables), v


class DoubleBlock(nn.Module):
    """Joint attention, then feed-forward, with weights for the text and weights for the image."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation = layers.VectorModulation(6, width)
        self.text_modulation = layers.VectorModulation(6, width)
        self.attention = JointAttention(width, config.num_attention_heads)
        self.mlp = layers.FeedForward(width, config.hidden)
        self.text_mlp = layers.FeedForward(width, config.hidden)

    def forward(self, x: Tensor, vector: Tensor, tables: Tables, texts: int) -> Tensor:
        """Map ``x [tokens, batch, width]``, the first ``texts`` of them text, given ``vector [1, batch, width]``."""
        shift, scale, gate, *rest = self.modulation(vector)
        text_shift, text_scale, text_gate, *text_rest = self.text_modulation(vector)
        text, image = x[:texts], x[texts:]
        of_text, of_image = self.attention(
            ops.adaln(text, text_shift, text_scale, EPS), ops.adaln(image, shift, scale, EPS), tables
        )
        text, image = ops.gated_add(text, of_text, text_gate), ops.gated_add(image, of_image, gate)
        return torch.cat((_feed(text, self.text_mlp, *text_rest), _feed(image, self.mlp, *rest)))


def _feed(x: Tensor, mlp: nn.Module, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return ops.gated_add(x, mlp(ops.adaln(x, shift, scale, EPS)), gate)


class SingleBlock(layers.WholeAttention):
    """Attention and feed-forward beside each other, with one weight before and one behind both.

    As in ViT-22B (Dehghani et al. 2023, arXiv:2302.05442).
    """

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.heads, self.head_dim, self.hidden = config.num_attention_heads, config.attention_head_dim, hidden
        self.modulation = layers.VectorModulation(3, width)
        self.qkv_up = layers.Linear(
            width, 3 * width + hidden, split="out", parts=(width,) * 3 + (hidden,), unit=self.head_dim
        )
        self.q_norm, self.k_norm = layers.HeadNorm(self.head_dim, EPS), layers.HeadNorm(self.head_dim, EPS)
        self.out_down = layers.Linear(width + hidden, width, split="in", parts=(width, hidden), unit=self.head_dim)

    def forward(self, x: Tensor, vector: Tensor, tables: Tables) -> Tensor:
        """Map ``x [tokens, batch, width]``, text and image alike, given ``vector [1, batch, width]``."""
        shift, scale, gate = self.modulation(vector)
        mixed = self.qkv_up(ops.adaln(x, shift, scale, EPS))
        share = mixed.shape[-1] // 7  # the feed-forward is four times as wide as q, k and v each
        *qkv, up = mixed.split((share, share, share, 4 * share), -1)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in qkv)
        own = self.own(tables)
        y = self.attend(self.q_norm.turned(q, own), self.k_norm.turned(k, own), v, len(tables[0]))
        return ops.gated_add(x, self.out_down(ops.join_gelu(y, up)), gate)


class VectorEmbedding(nn.Module):
    """Two layers that bring a sample's time, guidance or pooled text to the network's width."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.up = layers.Linear(inputs, width, tokens="all")
        self.out = layers.Linear(width, width, tokens="all")

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, inputs]`` to ``[batch, width]``."""
        return self.out(F.silu(self.up(x.to(self.up.weight.dtype))))


class Head(nn.Module):
    """Modulated norm and projection back to patches of latents."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.modulation = layers.VectorModulation(2, config.width)
        self.proj = layers.Linear(config.width, config.in_channels)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """Map ``[tokens, batch, width]`` to ``[tokens, batch, in_channels]``."""
        scale, shift = self.modulation(vector)
        return self.proj(ops.adaln(x, shift, scale, EPS))


class Flux(Trunk):
    """Embeddings, blocks for two streams, blocks for the joint one, projection back to latents.

    The batch holds ``x [batch, channels, height, width]``, ``time [batch]`` from 0 to 1000, ``text [batch, texts,
    joint_attention_dim]``, ``pooled [batch, pooled_projection_dim]``, with ``guidance_embeds`` ``guidance [batch]``,
    and for Kontext ``reference``, latents as ``x`` is, of any size. Returns the predicted velocity of ``x``.

    Tokens are the text's, the image's, then the reference's. Ranks share them out in this order; where ranks of tensor
    parallelism share them further (``sequence``), each holds its part of the text and of the images.
    """

    last = ("head",)
    compiles = True
    streams = True

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.image = layers.Linear(config.in_channels, width)
        self.text = layers.Linear(config.joint_attention_dim, width)
        self.time = VectorEmbedding(FREQUENCIES, width)
        self.pooled = VectorEmbedding(config.pooled_projection_dim, width)
        self.first = ("image", "text", "time", "pooled")
        if config.guidance_embeds:
            self.guidance = VectorEmbedding(FREQUENCIES, width)
            self.first += ("guidance",)
        double = (DoubleBlock(config) for _ in range(config.num_layers))
        single = (SingleBlock(config) for _ in range(config.num_single_layers))
        self.blocks = nn.ModuleList(itertools.chain(double, single))
        self.head = Head(config)

    def context(self, batch: Batch) -> Context:
        """Return how ranks share out text and image tokens, and the rotary tables in the orders ranks hold them in.

        Blocks of two streams join the ranks' text, then their images; those of one stream join what each rank holds.
        """
        shares = self._shares(batch)
        texts, images = shares[0 if self.cp is None else self.cp.rank]
        tables = self._tables(batch)
        return {
            "texts": even_share(texts, self.sequence_ranks),
            "shares": shares,
            "size": tuple(batch["x"].shape[2:]),
            "tables": tables,
            "joint_tables": _reordered(tables, shares, self.sequence_ranks),
        }

    def _shares(self, batch: Batch) -> list[tuple[int, int]]:
        """Return how many text and image tokens each rank of context parallelism holds."""
        texts, total = batch["text"].shape[1], self.tokens(batch)
        counts = [total] if self.cp is None else self.cp.shares(total)
        ends = list(itertools.accumulate(counts))
        held = [min(end, texts) - min(end - count, texts) for count, end in zip(counts, ends, strict=True)]
        return [(own, count - own) for own, count in zip(held, counts, strict=True)]

    def _tables(self, batch: Batch) -> Tables:
        dims, device = self.config.axes_dims_rope, batch["x"].device
        still = torch.ones(batch["text"].shape[1], sum(dims), device=device)
        parts = [(still, torch.zeros_like(still))]
        for index, name in enumerate(_images(batch)):
            rows, columns = (side // PATCH for side in batch[name].shape[2:])
            # The first axis tells the images apart.
            cos, sin = ops.grid_rope_tables((index + 1, rows, columns), dims, THETA, device)
            parts.append((cos[index * rows * columns :], sin[index * rows * columns :]))
        cos, sin = (torch.cat(tables) for tables in zip(*parts, strict=True))
        return cos, sin

    def embed(self, batch: Batch, context: Context) -> State:
        """Return this rank's tokens, and the vector that modulates them."""
        kind = self.image.weight.dtype
        text = batch["text"].to(kind).transpose(0, 1)
        image = torch.cat([pack(batch[name].to(kind)) for name in _images(batch)])
        if self.cp is not None:
            (texts, images), before = context["shares"][self.cp.rank], context["shares"][: self.cp.rank]
            text = text.narrow(0, sum(share[0] for share in before), texts)
            image = image.narrow(0, sum(share[1] for share in before), images)
        if self.image.tp is not None:
            text, image = self.image.tp.own_tokens(text), self.image.tp.own_tokens(image)
        vector = self.time(layers.sinusoids(batch["time"], FREQUENCIES)) + self.pooled(batch["pooled"])
        if self.config.guidance_embeds:
            vector = vector + self.guidance(layers.sinusoids(TIMES * batch["guidance"], FREQUENCIES))
        return {"x": torch.cat((self.text(text), self.image(image))), "vector": F.silu(vector)[None]}

    def step(self, index: int, block: nn.Module, state: State, context: Context) -> State:
        """Run one block."""
        x, vector = state["x"], state["vector"]
        if isinstance(block, SingleBlock):
            x = block(x, vector, context["joint_tables"])
        else:
            x = block(x, vector, context["tables"], context["texts"])
        return {"x": x, "vector": vector}

    def finish(self, state: State, context: Context) -> Tensor:
        """Return the velocity of the whole image, on every rank; what was predicted of the reference is left out."""
        x = self.head(state["x"][context["texts"] :], state["vector"])
        if self.head.proj.tp is not None:
            x = self.head.proj.tp.all_tokens(x)
        if self.cp is not None:
            images = [images for _, images in context["shares"]]
            x = self.cp.gather(x, sum(images), images)
        return unpack(x, context["size"])

    def tokens(self, batch: Batch) -> int:
        """Return the tokens of a sample: its text's, and a token for each 2 x 2 latents of its images."""
        pixels = sum(batch[name].shape[2] * batch[name].shape[3] for name in _images(batch))
        return int(batch["text"].shape[1] + pixels // PATCH**2)

    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """Return the State's shapes; this rank holds its share of the tokens and all of the vector."""
        size, width = len(batch["x"]), self.config.width
        return {"x": (self.held(batch), size, width), "vector": (1, size, width)}

    def initialise(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        """Start as DiT does (Peebles and Xie 2022): blocks add nothing yet, and the output is zero.

        The release says nothing of how it began.
        """
        if name.endswith("norm.weight"):
            weight.fill_(1)
        elif weight.dim() == 1 or "modulation" in name or name.startswith("head."):
            weight.zero_()
        elif name.startswith(("time.", "guidance.", "pooled.")):
            weight.normal_(0, 0.02, generator=generator)
        else:
            # Xavier's rule for each stacked projection alone: rows are outputs.
            width, leaf = self.config.width, name.split(".")[-2]
            stacked = {"qkv": (width,) * 3, "text_qkv": (width,) * 3, "qkv_up": (width,) * 3 + (self.config.hidden,)}
            for part in weight.split(stacked.get(leaf, weight.shape[0])):
                bound = (6 / (part.shape[1] + part.shape[0])) ** 0.5
                part.uniform_(-bound, bound, generator=generator)


def _images(batch: Batch) -> tuple[str, ...]:
    return ("x", "reference") if "reference" in batch else ("x",)


def _reordered(tables: Tables, shares: list[tuple[int, int]], ranks: int) -> Tables:
    """Return tables in the order that joining what each rank holds gives: of the first rank text, images, and so on."""
    if ranks == 1:
        return tables
    order, start, device = [], 0, tables[0].device
    for texts, images in shares:
        held = torch.arange(start, start + texts + images, device=device).split((texts, images))
        text, image = (each.view(ranks, even_share(len(each), ranks)) for each in held)
        order.append(torch.cat((text, image), 1).flatten())
        start += texts + images
    places = torch.cat(order)
    return tables[0][places], tables[1][places]


def pack(latents: Tensor) -> Tensor:
    """Return ``[tokens, batch, 4 channels]`` of ``[batch, channels, height, width]``; the channel varies slowest."""
    batch, channels, height, width = latents.shape
    x = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return x.permute(2, 4, 0, 1, 3, 5).reshape(-1, batch, channels * PATCH**2)


def unpack(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the latents ``[batch, channels, *size]`` of the first tokens."""
    rows, columns = (side // PATCH for side in size)
    x = x[: rows * columns].unflatten(-1, (-1, PATCH, PATCH)).unflatten(0, (rows, columns))
    return x.permute(2, 3, 0, 4, 1, 5).reshape(x.shape[2], -1, *size)
