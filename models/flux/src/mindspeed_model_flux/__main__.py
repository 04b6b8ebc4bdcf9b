"""Run the ``mindspeed-flux`` command as ``python -m mindspeed_model_flux``, for torchrun."""

from . import cli

cli()
