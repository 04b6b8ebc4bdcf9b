"""Wan2.1 for mindspeed-model-core."""

from mindspeed_model_core.model import Model

from .config import PRESETS, Wan21Config
from .generate import generate_command
from .model import Wan21
from .prepare import prepare_command
from .task import FlowMatching, Wan21Recipe
from .weights import LAYOUTS

MODEL = Model(
    name="wan21",
    package=__name__,
    presets=PRESETS,
    build=Wan21,
    task=FlowMatching,
    recipe=Wan21Recipe,
    layouts=LAYOUTS,
    commands=(prepare_command, generate_command),
)


def cli() -> None:
    """Run the ``mindspeed-wan21`` command."""
    from mindspeed_model_core.cli import run

    run(MODEL)


__all__ = ["MODEL", "Wan21", "Wan21Config", "cli"]
