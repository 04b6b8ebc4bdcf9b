"""The smallest network that meets every way of holding a parameter, for core's own tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as layers
from ..model import Model
from ..recipe import Recipe, Section
from ..task import Unit, Work
from ..trunk import Batch, Context, State, Trunk

WIDTH, HIDDEN, ROWS = 6, 20, 8


class ToyConfig(Section):
    """How many blocks, and their widths: between them, within them, and of the part that goes aside."""

    blocks: int = 4
    width: int = WIDTH
    hidden: int = HIDDEN
    aside: int = 4


class Block(nn.Module):
    """Norm, a projection of stacked parts with bias, and back; widths that no number of data ranks divides."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        width, self.hidden, self.aside = config.width, config.hidden, config.aside
        self.norm = layers.RMSNorm(width, 1e-6)
        self.up = layers.Linear(width, self.hidden + self.aside, split="out", parts=(self.hidden, self.aside), unit=2)
        self.down = layers.Linear(self.hidden, width, split="in", unit=2)
        self.side = layers.Linear(self.aside, width, split="in", unit=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[rows, width]`` to the same shape."""
        mixed = self.up(self.norm(x))
        share = mixed.shape[-1] * self.aside // (self.hidden + self.aside)
        wide, narrow = mixed.split((mixed.shape[-1] - share, share), -1)
        return x + self.down(wide.tanh()) + self.side(narrow)


class Toy(Trunk):
    """Regression from token ids: embedding, blocks, vocabulary head."""

    first = ("table",)
    last = ("head",)

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.table = layers.Embedding(12, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.head = layers.VocabHead(config.width, 12)

    def context(self, batch: Batch) -> Context:
        """Return the labels."""
        return {"labels": batch.get("labels")}

    def embed(self, batch: Batch, context: Context) -> State:
        """Look ids up."""
        return {"x": self.table(batch["ids"])}

    def step(self, index: int, block: nn.Module, state: State, context: Context) -> State:
        """Run one block."""
        return {"x": block(state["x"])}

    def finish(self, state: State, context: Context) -> Tensor:
        """Return logits or the loss."""
        return self.head(state["x"], context["labels"])

    def tokens(self, batch: Batch) -> int:
        """Return the rows."""
        return len(batch["ids"])

    def shapes(self, batch: Batch) -> dict[str, tuple[int, ...]]:
        """Return the rows at a stage boundary."""
        return {"x": (self.held(batch), self.config.width)}

    def initialise(self, name: str, weight: Tensor, generator: torch.Generator) -> None:
        """Draw everything from a normal."""
        weight.normal_(0, 0.5, generator=generator)


def batch(seed: int, rows: int = ROWS) -> Batch:
    """Return random ids, some of them with labels."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(12, (rows,), generator=draw)
    labels = torch.randint(12, (rows,), generator=draw)
    labels[: seed % rows] = -100
    return {"ids": ids, "labels": labels}


class ToyLoader:
    """Endless batches; its position is the number of steps."""

    def __init__(self, recipe: Recipe, rank: int, ranks: int) -> None:
        self.recipe, self.rank, self.ranks, self.at = recipe, rank, ranks, 0

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            self.at += 1
            size = self.recipe.global_batch
            yield [batch(self.at * size + i) for i in range(self.rank, size, self.ranks)]

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.at = int(state["at"])


class ToyTask:
    """Cross entropy of the labels."""

    unit: Unit = "tokens"

    def __init__(self, recipe: Recipe, config: ToyConfig) -> None:
        self.recipe = recipe

    def data(self, rank: int, ranks: int) -> ToyLoader:
        """Return the batches."""
        return ToyLoader(self.recipe, rank, ranks)

    synthetic = data

    def encode(self, batch: Batch) -> Batch:
        """Return the batch."""
        return batch

    def count(self, batch: Batch) -> int:
        """Return how many rows have labels."""
        return int((batch["labels"] != -100).sum())

    def work(self, batch: Batch) -> Work:
        """Return rows as units."""
        return Work(1, len(batch["ids"]), 1e6)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the loss."""
        return output


TOY = Model(
    name="toy",
    package="mindspeed_model_core.testing",
    presets={"tiny": ToyConfig()},
    build=Toy,
    task=ToyTask,
    recipe=Recipe,
    layouts=(),
)


def recipe(**changes: Any) -> Recipe:
    """Return a recipe for the toy, in fp32 without trackers."""
    fields: dict[str, Any] = {
        "preset": "tiny",
        "precision": "fp32",
        "steps": 6,
        "global_batch": 8,
        "metrics": {"trackers": ()},
        "optim": {"lr": 1e-2},
    }
    return Recipe(**{**fields, **changes})
