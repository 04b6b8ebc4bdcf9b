"""Next-token prediction of a text, given its sound."""

from __future__ import annotations

import math

from mindspeed_model_core.data import IGNORE, Loader
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import Recipe
from mindspeed_model_core.task import Unit, Work
from mindspeed_model_core.trunk import Batch
from torch import Tensor

from .config import WhisperConfig
from .data import WhisperData, open_data, synthetic_data


class WhisperRecipe(Recipe):
    """A Whisper training recipe."""

    data: WhisperData = WhisperData()


class Transcription:
    """Cross entropy of each token given the sound and the tokens before it, language and task among them."""

    unit: Unit = "samples"

    def __init__(self, recipe: WhisperRecipe, config: WhisperConfig) -> None:
        _check_sequence(recipe, config)
        self.recipe, self.config = recipe, config

    def data(self, rank: int, ranks: int) -> Loader:
        """Open the recipe's sounds for one data rank."""
        return open_data(self.recipe, self.config, rank, ranks)

    def synthetic(self, rank: int, ranks: int) -> Loader:
        """Return random features and tokens."""
        return synthetic_data(self.recipe, self.config, rank, ranks)

    def encode(self, batch: Batch) -> Batch:
        """Return the batch unchanged: its features were computed as it was read."""
        return batch

    def count(self, batch: Batch) -> int:
        """Return how many tokens have a label."""
        return int((batch["labels"] != IGNORE).sum())

    def work(self, batch: Batch) -> Work:
        """Return samples and training FLOPs, counting attention and padding in full."""
        samples, length = batch["tokens"].shape
        return Work(samples, samples, self.recipe.passes * samples * forward_flops(self.config, length))

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the sum of the tokens' losses, which the network computed."""
        return output


def _check_sequence(recipe: WhisperRecipe, config: WhisperConfig) -> None:
    """Raise UserError unless tensor-parallel ranks can share a micro-batch's sounds evenly, where they are to.

    Texts are padded until they can.
    """
    parallel, batch, positions = recipe.parallel, recipe.micro_batch, config.max_source_positions
    if not parallel.sequence or batch * positions % parallel.tp == 0:
        return
    step = parallel.tp // math.gcd(parallel.tp, positions)
    down, up = batch // step * step, -(-batch // step) * step
    fits = " or ".join(str(each) for each in (down, up) if each)
    raise UserError(
        f"micro_batch={batch}: with parallel.sequence=true, parallel.tp={parallel.tp} must divide its sounds of "
        f"{positions} positions; nearest: {fits}, or parallel.sequence=false"
    )


def forward_flops(config: WhisperConfig, length: int) -> float:
    """Return the multiply-adds, times two, of one forward pass over one sound and a text of so many tokens."""
    d, audio = config.d_model, config.max_source_positions
    ends = 2 * config.frames * 3 * config.num_mel_bins * d + 2 * audio * 3 * d * d + 2 * length * d * config.vocab_size
    encoder = 8 * audio * d * d + 4 * audio**2 * d + 4 * audio * d * config.encoder_ffn_dim
    decoder = 8 * length * d * d + 4 * length**2 * d + 4 * length * d * config.decoder_ffn_dim
    decoder += 4 * length * d * d + 4 * audio * d * d + 4 * length * audio * d  # to the sound
    return float(config.encoder_layers * encoder + config.decoder_layers * decoder + ends)
