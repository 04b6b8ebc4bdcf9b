"""Run the ``mindspeed-wan21`` command as ``python -m mindspeed_model_wan21``, for torchrun."""

from . import cli

cli()
