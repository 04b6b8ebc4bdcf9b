"""Run the ``mindspeed-llama2`` command as ``python -m mindspeed_model_llama2``, for torchrun."""

from . import cli

cli()
