"""FLUX.1 for mindspeed-model-core."""

from mindspeed_model_core.model import Model

from .config import PRESETS, FluxConfig
from .generate import generate_command
from .model import Flux
from .prepare import prepare_command
from .task import FluxRecipe, RectifiedFlow
from .weights import LAYOUTS

MODEL = Model(
    name="flux",
    package=__name__,
    presets=PRESETS,
    build=Flux,
    task=RectifiedFlow,
    recipe=FluxRecipe,
    layouts=LAYOUTS,
    commands=(prepare_command, generate_command),
)


def cli() -> None:
    """Run the ``mindspeed-flux`` command."""
    from mindspeed_model_core.cli import run

    run(MODEL)


__all__ = ["MODEL", "Flux", "FluxConfig", "cli"]
