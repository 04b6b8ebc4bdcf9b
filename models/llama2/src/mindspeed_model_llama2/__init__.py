"""Llama-2 for mindspeed-model-core."""

from mindspeed_model_core.model import Model

from .config import PRESETS, Llama2Config
from .generate import generate_command
from .model import Llama2
from .task import Llama2Recipe, NextToken
from .weights import LAYOUTS

MODEL = Model(
    name="llama2",
    package=__name__,
    presets=PRESETS,
    build=Llama2,
    task=NextToken,
    recipe=Llama2Recipe,
    layouts=LAYOUTS,
    commands=(generate_command,),
)


def cli() -> None:
    """Run the ``mindspeed-llama2`` command."""
    from mindspeed_model_core.cli import run

    run(MODEL)


__all__ = ["MODEL", "Llama2", "Llama2Config", "cli"]
