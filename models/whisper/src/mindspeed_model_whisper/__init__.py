"""Whisper for mindspeed-model-core."""

from mindspeed_model_core.model import Model

from .config import PRESETS, WhisperConfig
from .evaluate import evaluate_command
from .generate import transcribe_command
from .model import Whisper
from .task import Transcription, WhisperRecipe
from .weights import LAYOUTS

MODEL = Model(
    name="whisper",
    package=__name__,
    presets=PRESETS,
    build=Whisper,
    task=Transcription,
    recipe=WhisperRecipe,
    layouts=LAYOUTS,
    commands=(transcribe_command, evaluate_command),
)


def cli() -> None:
    """Run the ``mindspeed-whisper`` command."""
    from mindspeed_model_core.cli import run

    run(MODEL)


__all__ = ["MODEL", "Whisper", "WhisperConfig", "cli"]
