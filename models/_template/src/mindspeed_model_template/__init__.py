"""A network that predicts the next byte, for mindspeed-model-core."""

from mindspeed_model_core.model import Model

from .config import PRESETS, TemplateConfig
from .generate import generate_command
from .model import Template
from .task import NextByte, TemplateRecipe
from .weights import LAYOUTS

MODEL = Model(
    name="template",
    package=__name__,
    presets=PRESETS,
    build=Template,
    task=NextByte,
    recipe=TemplateRecipe,
    layouts=LAYOUTS,
    commands=(generate_command,),
)


def cli() -> None:
    """Run the ``mindspeed-template`` command."""
    from mindspeed_model_core.cli import run

    run(MODEL)


__all__ = ["MODEL", "Template", "TemplateConfig", "cli"]
