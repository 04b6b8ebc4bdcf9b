"""The Whisper network (Radford et al. 2022, arXiv:2212.04356): single-device code on core's layers.

Activations are flat, ``[batch x positions, width]``, one sample after the other, of audio as of text.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from mindspeed_model_core import nn as layers
from mindspeed_model_core import ops
from mindspeed_model_core.parallel.placement import Placement
from mindspeed_model_core.parallel.tensor import TensorParallel
from mindspeed_model_core.trunk import Batch, Context, State, Trunk
from torch import Tensor, nn

from .config import WhisperConfig

Lengths = tuple[int, ...]


class Projections(layers.Linear):
    """Projections of one width stacked in one weight, the ``keys`` among them without bias."""

    def __init__(self, width: int, kinds: str, head_dim: int) -> None:
        count = len(kinds)
        super().__init__(width, count * width, bias=False, split="out", parts=(width,) * count, unit=head_dim)
        self.kinds = kinds
        self.bias = nn.Parameter(torch.zeros((count - kinds.count("k")) * width))

    def placements(self) -> dict[str, Placement]:
        """Return the shares of heads; the bias stacks fewer projections than the weight."""
        found = super().placements()
        stacked = self.parts[: len(self.kinds) - self.kinds.count("k")]
        return {**found, "bias": Placement(0, stacked, self.unit)}

    def offset(self) -> Tensor:
        """Return the bias of all projections, zero for keys."""
        given = iter(self.bias.chunk(len(self.kinds) - self.kinds.count("k")))
        zero = self.bias.new_zeros(len(self.weight) // len(self.kinds))
        return torch.cat([zero if kind == "k" else next(given) for kind in self.kinds])


class SelfAttention(nn.Module):
    """Audio attends to all of its sample, text with ``causal`` to what precedes it."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.head_dim, self.causal = width // heads, causal
        self.qkv = Projections(width, "qkv", self.head_dim)
        self.out = layers.Linear(width, width, split="in", unit=self.head_dim)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """Map ``[tokens, width]`` to the same shape; ``lengths`` are those of the samples."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in ops.apart(self.qkv(x), 3))
        return self.out(ops.attention(q, k, v, lengths, causal=self.causal).flatten(1))


class CrossAttention(nn.Module):
    """Text attends to the audio of its sample."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q = layers.Linear(width, width, split="out", unit=self.head_dim)
        self.kv = Projections(width, "kv", self.head_dim)
        self.out = layers.Linear(width, width, split="in", unit=self.head_dim)

    def forward(self, y: Tensor, x: Tensor, batch: int) -> Tensor:
        """Map text ``y [tokens, width]`` to the same shape, given audio ``x`` of as many samples."""
        q, k, v = (self._heads(z, batch) for z in (self.q(y), *ops.apart(self.kv(x), 2)))
        return self.out(ops.full_attention(q, k, v).transpose(0, 1).flatten(2).flatten(0, 1))

    def _heads(self, z: Tensor, batch: int) -> Tensor:
        return z.unflatten(-1, (-1, self.head_dim)).unflatten(0, (batch, -1)).transpose(0, 1)


class EncoderBlock(nn.Module):
    """Pre-norm attention and feed-forward on audio; the last one norms what the decoder attends to."""

    def __init__(self, config: WhisperConfig, *, last: bool) -> None:
        super().__init__()
        width = config.d_model
        self.attention_norm = layers.LayerNorm(width)
        self.attention = SelfAttention(width, config.encoder_attention_heads, causal=False)
        self.mlp_norm = layers.LayerNorm(width)
        self.mlp = layers.FeedForward(width, config.encoder_ffn_dim, approximate="none")
        self.final_norm = layers.LayerNorm(width) if last else None

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """Map ``[tokens, width]`` to the same shape."""
        h = self.attention(self.attention_norm(x), lengths)
        h, x = self.mlp_norm.add(h, x)
        h = self.mlp(h)
        return x + h if self.final_norm is None else self.final_norm.add(h, x)[0]


class DecoderBlock(nn.Module):
    """Pre-norm causal attention, attention to the audio and feed-forward on text."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        width, heads = config.d_model, config.decoder_attention_heads
        self.attention_norm = layers.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=True)
        self.cross_norm = layers.LayerNorm(width)
        self.cross_attention = CrossAttention(width, heads)
        self.mlp_norm = layers.LayerNorm(width)
        self.mlp = layers.FeedForward(width, config.decoder_ffn_dim, approximate="none")

    def forward(self, y: Tensor, x: Tensor, lengths: Lengths) -> Tensor:
        """Map text ``y [tokens, width]`` to the same shape, given audio ``x``."""
        h = self.attention(self.attention_norm(y), lengths)
        h, y = self.cross_norm.add(h, y)
        h = self.cross_attention(h, x, len(lengths))
        h, y = self.mlp_norm.add(h, y)
        return y + self.mlp(h)


class AudioEmbedding(nn.Module):
    """Two convolutions of three frames, the second with stride 2: as products with windows of the input."""

    def __init__(self, mels: int, width: int) -> None:
        super().__init__()
        self.conv1 = layers.Linear(3 * mels, width)
        self.conv2 = layers.Linear(3 * width, width)

    def forward(self, mel: Tensor, positions: Tensor) -> Tensor:
        """Map ``[batch, mels, frames]`` to this rank's share of ``[batch x frames / 2, width]``."""
        x = _windows(F.gelu(self.conv1(_windows(mel.transpose(1, 2), 1))), 2).flatten(0, 1)
        positions = positions.to(x.dtype).repeat(len(mel), 1)
        if self.conv2.tp is not None:
            # Each rank then has its own tokens' part of the first convolution's gradient, as its placement says.
            x, positions = self.conv2.tp.own_tokens(x), self.conv2.tp.own_tokens(positions)
        return F.gelu(self.conv2(x)) + positions


def _windows(x: Tensor, stride: int) -> Tensor:
    """Return windows of three of ``[batch, frames, width]``, every ``stride`` frames, zeros beyond both ends.

    Their features are ordered as a kernel's: for each of ``width`` the three frames.
    """
    return F.pad(x, (0, 0, 1, 1)).unfold(1, 3, stride).flatten(2)


class TextPositions(nn.Module):
    """Learned positions of text, added to its embedding."""

    tp: TensorParallel | None = None

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width))

    def placements(self) -> dict[str, Placement]:
        """Return a replica; with sequence parallelism its gradient covers only this rank's tokens."""
        return {"weight": Placement(partial=self.tp is not None and self.tp.sequence)}

    def forward(self, batch: int, length: int) -> Tensor:
        """Return this rank's share of ``[batch x length, width]``."""
        rows = self.weight[:length].repeat(batch, 1)
        return rows if self.tp is None else self.tp.own_tokens(rows)


class Whisper(Trunk):
    """Audio and text embedding; encoder blocks, then decoder blocks; norm and the tied vocabulary head.

    The batch holds ``mel [batch, mels, frames]``, ``tokens`` (int64 ``[batch, length]``, what the decoder reads) and,
    to get their loss instead of logits, ``labels``, int64 of the same shape. Text crosses the encoder's blocks
    untouched, and audio the decoder's, so blocks may lie on any pipeline stages.
    """

    first = ("audio", "positions")
    last = ("norm",)
    tied = ("embed_tokens",)
    compiles = True

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        width, count = config.d_model, config.encoder_layers
        self.audio = AudioEmbedding(config.num_mel_bins, width)
        self.embed_tokens = layers.TiedVocab(config.vocab_size, width)
        self.positions = TextPositions(config.max_target_positions, width)
        encoder = [EncoderBlock(config, last=number == count - 1) for number in range(count)]
        self.blocks = nn.ModuleList([*encoder, *(DecoderBlock(config) for _ in range(config.decoder_layers))])
        self.norm = layers.LayerNorm(width)

    def context(self, batch: Batch) -> Context:
        """Return the audio's positions, both lengths of each sample, and the labels."""
        mel, tokens, labels = batch["mel"], batch["tokens"], batch.get("labels")
        size, length = tokens.shape
        return {
            "positions": positions(mel, self.config),
            "audio": (mel.shape[2] // 2,) * size,
            "text": (length,) * size,
            "labels": None if labels is None else labels.flatten(),
        }

    def embed(self, batch: Batch, context: Context) -> State:
        """Return audio ``x`` and text ``y``."""
        tokens = batch["tokens"]
        y = self.embed_tokens(tokens.flatten()) + self.positions(*tokens.shape)
        return {"x": self.hear(batch["mel"], context["positions"]), "y": y}

    def hear(self, mel: Tensor, positions: Tensor) -> Tensor:
        """Return what enters the encoder's first block, given the ``positions`` of what is heard."""
        return self.audio(mel.to(self.audio.conv1.weight.dtype), positions)

    def step(self, index: int, block: nn.Module, state: State, context: Context) -> State:
        """Run one block, of the encoder on audio or of the decoder on text."""
        x, y = state["x"], state["y"]
        if isinstance(block, EncoderBlock):
            return {"x": block(x, context["audio"]), "y": y}
        return {"x": x, "y": block(y, x, context["text"])}

    def finish(self, state: State, context: Context) -> Tensor:
        """Return logits ``[batch, length, vocab]``, or with labels the sum of their losses."""
        out = self.embed_tokens.head(self.norm(state["y"]), context["labels"])
        return out if context["labels"] is not None else out.unflatten(0, (len(context["text"]), -1))

    def constants(self, context: Context) -> tuple[int, ...]:
        """Return how many samples there are, and the length of their texts."""
        return len(context["text"]), context["text"][0]

    def tokens(self, batch: Batch) -> int:
        """Return the positions of all audio."""
        mel = batch["mel"]
        return len(mel) * (mel.shape[2] // 2)

    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """Return the shapes of audio and text; sequence parallelism keeps this rank's share of either."""
        width = self.config.d_model
        return {"x": (self.held(batch), width), "y": (self.share(batch["tokens"].numel()), width)}

    def initialise(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        """Norms start at one, biases at zero, the rest at a normal of ``init_std``."""
        if name.endswith("norm.weight"):
            weight.fill_(1)
        elif weight.dim() == 1:
            weight.zero_()
        else:
            weight.normal_(0, self.config.init_std, generator=generator)


def positions(mel: Tensor, config: WhisperConfig) -> Tensor:
    """Return the audio's positions ``[length, width]``, on the device where its log-mel features are."""
    return _positions(mel.shape[2] // 2, mel.device, config)


@functools.lru_cache(4)
def _positions(length: int, device: torch.device, config: WhisperConfig) -> Tensor:
    with torch.inference_mode(False):  # they are kept, for training too
        return sinusoids(length, config.d_model).to(device)


def sinusoids(length: int, width: int) -> Tensor:
    """Return the audio's positions ``[length, width]`` in fp32: sines, then cosines, wavelengths of 2 pi to 1e4 x 2 pi.

    The release keeps them in its files and does not train them. On the CPU, whose rounding the files have.
    """
    half = width // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device="cpu"))
    angles = torch.arange(length, device="cpu")[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), 1)
