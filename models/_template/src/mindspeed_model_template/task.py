"""Predicting each byte from those before it."""

from __future__ import annotations

from functools import partial
from typing import Any

from mindspeed_model_core.data import IGNORE, SlotLoader
from mindspeed_model_core.recipe import Recipe
from mindspeed_model_core.task import Unit, Work
from mindspeed_model_core.trunk import Batch
from torch import Tensor

from .config import TemplateConfig
from .data import ByteText, RandomBytes, TemplateData, collate, load_bytes


class TemplateRecipe(Recipe):
    """A recipe with the file to learn from."""

    data: TemplateData = TemplateData()


class NextByte:
    """Cross entropy of each byte given the window before it."""

    unit: Unit = "tokens"

    def __init__(self, recipe: TemplateRecipe, config: TemplateConfig) -> None:
        self.recipe, self.config = recipe, config

    def data(self, rank: int, ranks: int) -> SlotLoader:
        """Open the recipe's file for one data rank."""
        recipe, window = self.recipe, self.config.window
        text = load_bytes(recipe.data, window, recipe.global_batch)
        source = ByteText(text, window, recipe.data.sequence_length, recipe.global_batch, recipe.seed)
        return self._loader(source, rank, ranks, identity={"bytes": len(text) - window})

    def synthetic(self, rank: int, ranks: int) -> SlotLoader:
        """Return random bytes."""
        source = RandomBytes(self.config.window, self.recipe.data.sequence_length, self.recipe.seed)
        return self._loader(source, rank, ranks)

    def _loader(self, source: Any, rank: int, ranks: int, **options: Any) -> SlotLoader:
        return SlotLoader(
            source,
            partial(collate, window=self.config.window),
            global_batch=self.recipe.global_batch,
            micro_batch=self.recipe.micro_batch,
            rank=rank,
            ranks=ranks,
            **options,
        )

    def encode(self, batch: Batch) -> Batch:
        """Return the batch unchanged: bytes have no encoder."""
        return batch

    def count(self, batch: Batch) -> int:
        """Return how many bytes have a label."""
        return int((batch["labels"] != IGNORE).sum())

    def work(self, batch: Batch) -> Work:
        """Return samples, bytes and training FLOPs: three matrices a block and the head, forward and twice back."""
        tokens, config = batch["labels"].numel(), self.config
        block = 3 * config.hidden_size * config.intermediate_size
        weights = config.num_hidden_layers * block + config.hidden_size * config.vocab_size
        return Work(tokens // self.recipe.data.sequence_length, tokens, self.recipe.passes * 2.0 * weights * tokens)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the sum of the bytes' losses, which the network computed."""
        return output
