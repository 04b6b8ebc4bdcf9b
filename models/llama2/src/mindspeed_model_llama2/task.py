"""Next-token prediction on packed documents."""

from __future__ import annotations

import math

from mindspeed_model_core.data import IGNORE, Loader, PackedText, RandomText
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import Recipe
from mindspeed_model_core.task import Unit, Work
from mindspeed_model_core.trunk import Batch
from torch import Tensor

from .config import Llama2Config
from .data import Llama2Data, open_tokenizer


class Llama2Recipe(Recipe):
    """A Llama-2 pre-training recipe."""

    data: Llama2Data = Llama2Data()


class NextToken:
    """Cross entropy of each token given those before it in its document."""

    unit: Unit = "tokens"

    def __init__(self, recipe: Llama2Recipe, config: Llama2Config) -> None:
        self.recipe, self.config = recipe, config
        length, most = recipe.data.sequence_length, config.max_position_embeddings
        if length > most:
            raise UserError(
                f"data.sequence_length={length}: the network knows {most} positions; shorten the sequences or set "
                f"config.max_position_embeddings={length}"
            )
        _check_sequence(recipe, most)

    def data(self, rank: int, ranks: int) -> Loader:
        """Open the recipe's text for one data rank."""
        data = self.recipe.data
        tokenizer = open_tokenizer(data, self.recipe.init_from, self.config)
        return PackedText(data, tokenizer, **self._order(rank, ranks))

    def synthetic(self, rank: int, ranks: int) -> Loader:
        """Return random tokens in documents of the recipe's mean length."""
        data = self.recipe.data
        return RandomText(
            vocab_size=self.config.vocab_size,
            sequence_length=data.sequence_length,
            mean_document=data.synthetic_document,
            **self._order(rank, ranks),
        )

    def _order(self, rank: int, ranks: int) -> dict[str, int]:
        recipe = self.recipe
        return {
            "global_batch": recipe.global_batch,
            "micro_batch": recipe.micro_batch,
            "seed": recipe.seed,
            "rank": rank,
            "ranks": ranks,
        }

    def encode(self, batch: Batch) -> Batch:
        """Return the batch unchanged: text has no encoder."""
        return batch

    def count(self, batch: Batch) -> int:
        """Return how many tokens have a label."""
        return int((batch["labels"] != IGNORE).sum())

    def work(self, batch: Batch) -> Work:
        """Return samples, tokens and training FLOPs, counting attention in full over the sequence length.

        That is the convention of the published MFU figures; packed documents and the causal mask do less.
        """
        tokens, length = len(batch["tokens"]), self.recipe.data.sequence_length
        flops = self.recipe.passes * forward_flops(self.config, length)
        return Work(tokens // length, tokens, flops * (tokens / length))

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the sum of the tokens' losses, which the network computed."""
        return output


def _check_sequence(recipe: Llama2Recipe, most: int) -> None:
    """Raise UserError unless tensor-parallel ranks can share a micro-batch's tokens evenly, where they are to."""
    parallel, length, batch = recipe.parallel, recipe.data.sequence_length, recipe.micro_batch
    if not parallel.sequence or batch * length % parallel.tp == 0:
        return
    step = parallel.tp // math.gcd(parallel.tp, batch)
    fits = max(step, round(length / step) * step)
    fits = fits if fits <= most else most // step * step
    raise UserError(
        f"data.sequence_length={length}: with parallel.sequence=true, the tokens of micro_batch={batch} must divide by "
        f"parallel.tp={parallel.tp}" + (f"; nearest: {fits}" if fits else "; set parallel.sequence=false")
    )


def forward_flops(config: Llama2Config, length: int) -> float:
    """Return the multiply-adds, times two, of one forward pass over one sequence: projections, attention, head."""
    d, hd, f = config.hidden_size, config.head_dim, config.intermediate_size
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    weights = 2 * d * heads * hd + 2 * d * kv * hd + 3 * d * f
    block = 2 * length * weights + 4 * length**2 * heads * hd
    return float(config.num_hidden_layers * block + 2 * length * d * config.vocab_size)
