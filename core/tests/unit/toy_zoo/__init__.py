"""A model package with everything the command line needs, and no files to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import typer
from mindspeed_model_core import nn as layers
from mindspeed_model_core import ops
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.model import Model
from mindspeed_model_core.recipe import Recipe, Section, local
from mindspeed_model_core.task import Work
from mindspeed_model_core.trunk import Batch, Context, State, Trunk
from pydantic import PositiveInt
from torch import Tensor, nn


class ToyConfig(Section):
    """Sizes."""

    width: PositiveInt = 32
    hidden: PositiveInt = 48
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    layers: PositiveInt = 4
    vocab: PositiveInt = 64


class ToyData(Section):
    """Where the data is and how long a sequence is."""

    path: str | None = local(None)
    length: PositiveInt = 16
    kind: Literal["csv", "text"] | None = local(None)


class ToyRecipe(Recipe):
    """A recipe with a section of its own."""

    data: ToyData = ToyData()


class Block(nn.Module):
    """Attention and feed-forward."""

    def __init__(self, c: ToyConfig) -> None:
        super().__init__()
        self.norm = layers.RMSNorm(c.width, 1e-5)
        self.attention = layers.Attention(c.width, c.heads, c.kv_heads)
        self.mlp = layers.SwiGLU(c.width, c.hidden)

    def forward(self, x: Tensor, tables: Any, lengths: tuple[int, ...]) -> Tensor:
        """Map ``[tokens, width]`` to the same shape."""
        x = x + self.attention(self.norm(x), tables, lengths)
        return x + self.mlp(x)


class Toy(Trunk):
    """A small decoder."""

    first = ("table",)
    last = ("norm", "head")

    def __init__(self, c: ToyConfig) -> None:
        super().__init__()
        self.config = c
        self.table = layers.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = layers.RMSNorm(c.width, 1e-5)
        self.head = layers.VocabHead(c.width, c.vocab)

    def context(self, batch: Batch) -> Context:
        """Return rotary tables, lengths and labels."""
        tables = ops.rope_tables(batch["positions"], self.config.width // self.config.heads, 10000.0)
        return {"tables": tables, "lengths": batch["lengths"], "labels": batch.get("labels")}

    def embed(self, batch: Batch, context: Context) -> State:
        """Return embeddings."""
        return {"x": self.table(batch["tokens"])}

    def step(self, index: int, block: nn.Module, state: State, context: Context) -> State:
        """Run one block."""
        return {"x": block(state["x"], context["tables"], context["lengths"])}

    def finish(self, state: State, context: Context) -> Tensor:
        """Return logits or the loss."""
        return self.head(self.norm(state["x"]), context["labels"])

    def tokens(self, batch: Batch) -> int:
        """Return the tokens of all documents."""
        return len(batch["tokens"])

    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """Return the State's shape."""
        return {"x": (self.held(batch), self.config.width)}

    def initialise(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        """Draw everything from a normal."""
        weight.normal_(0, 0.02, generator=generator)


class ToyTask:
    """Next token."""

    unit = "tokens"

    def __init__(self, recipe: ToyRecipe, config: ToyConfig) -> None:
        self.recipe, self.config = recipe, config

    def synthetic(self, rank: int, ranks: int) -> Iterator[list[Batch]]:
        """Return random tokens in two documents a micro-batch."""
        tokens = self.recipe.micro_batch * self.recipe.data.length
        while True:
            ids = torch.randint(self.config.vocab, (tokens,))
            first = tokens // 2
            yield [
                {"tokens": ids, "labels": ids, "positions": torch.arange(tokens), "lengths": (first, tokens - first)}
            ]

    def encode(self, batch: Batch) -> Batch:
        return batch

    def work(self, batch: Batch) -> Work:
        """Return nothing much."""
        return Work(1, len(batch["tokens"]), 1.0)


@dataclass(frozen=True)
class ToyLayout:
    """A layout in name only."""

    name: str


def hello_command(
    name: Annotated[str, typer.Argument(help="Whom to greet.")],
    loud: Annotated[bool, typer.Option("--loud")] = False,
) -> None:
    """Greet."""
    if name == "nobody":
        raise UserError("name='nobody': there is nobody")
    if name == "bug":
        raise RuntimeError("a bug")
    if name == "stop":
        raise KeyboardInterrupt
    if name == "full":
        raise OSError(28, "No space left on device", "out/model.bin")
    typer.echo(name.upper() if loud else name)


MODEL = Model(
    name="toy",
    package=__name__,
    presets={"tiny": ToyConfig(), "wide": ToyConfig(width=64)},
    build=Toy,
    task=ToyTask,
    recipe=ToyRecipe,
    layouts=(ToyLayout("hub"), ToyLayout("original")),  # type: ignore[arg-type]
    commands=(hello_command,),
)
