"""Llama-2's text: its sequence length and where its tokenizer is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspeed_model_core.data import TextData, load_tokenizer
from mindspeed_model_core.data.tokenizer import find_tokenizer
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.weights import check_folder
from pydantic import Field, PositiveInt

from .config import Llama2Config


class Llama2Data(TextData):
    """Text in sequences of Llama-2's context length."""

    sequence_length: PositiveInt = Field(4096, description="tokens per sample; Llama-2 was pre-trained with 4096")


def open_tokenizer(data: Llama2Data, init_from: str | None, config: Llama2Config) -> Any:
    """Return a recipe's tokenizer: ``data.tokenizer``, or the one that came with ``init_from``.

    Raises UserError if neither gives one, or if it does not fit the configuration.
    """
    source = data.tokenizer
    if source is None:
        if init_from is None:
            raise UserError("data.tokenizer: this field is required without init_from; give a folder with a tokenizer")
        check_folder(init_from, "init_from=")
        found = find_tokenizer(init_from)
        if found is None:
            raise UserError(f"init_from={init_from}: no tokenizer there; set data.tokenizer to a folder with one")
        return fitting_tokenizer(found, config)
    return fitting_tokenizer(source, config)


def fitting_tokenizer(source: str | Path, config: Llama2Config) -> Any:
    """Return a folder's tokenizer; UserError if its vocabulary or its begin or end token is not the model's."""
    tokenizer = load_tokenizer(source, config.vocab_size)
    for name in ("bos_token_id", "eos_token_id"):
        theirs, ours = getattr(tokenizer, name), getattr(config, name)
        if theirs != ours:
            raise UserError(
                f"tokenizer {source}: {name} is {theirs}, the model's is {ours}; set config.{name}={theirs}"
            )
    return tokenizer
