"""Run the ``mindspeed-template`` command as ``python -m mindspeed_model_template``, for torchrun."""

from . import cli

cli()
