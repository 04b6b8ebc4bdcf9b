"""Run the ``mindspeed-whisper`` command as ``python -m mindspeed_model_whisper``, for torchrun."""

from . import cli

cli()
