"""The network's configuration under the hub's field names, and its sizes."""

from __future__ import annotations

from mindspeed_model_core.recipe import Section
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt


class TemplateConfig(Section):
    """Sizes of the network; defaults are those shared by all sizes."""

    vocab_size: PositiveInt = 256
    window: PositiveInt = 8
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-5
    initializer_range: NonNegativeFloat = 0.05


PRESETS = {"tiny": TemplateConfig(hidden_size=32, intermediate_size=96, num_hidden_layers=4)}
