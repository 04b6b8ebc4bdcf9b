"""Noise levels: how often each is drawn."""

from __future__ import annotations

import torch
from mindspeed_model_core.flow import STEPS, FlowConfig, add_noise


def places(density: str) -> torch.Tensor:
    config = FlowConfig(shift=1.0, weighting="none", density=density)  # type: ignore[arg-type]
    noised = add_noise(torch.zeros(4000, 1), tuple(range(4000)), config)
    return STEPS - noised.time


def test_uniform_levels_are_each_drawn_alike() -> None:
    drawn = places("uniform")
    assert (drawn - drawn.round()).abs().max() < 1e-3
    assert abs(drawn.mean() - 500) < 15 and abs(drawn.std() - 1000 / 12**0.5) < 10


def test_logit_normal_levels_are_drawn_from_the_middle() -> None:
    logits = torch.logit((places("logit-normal") / STEPS).clamp(1e-3, 1 - 1e-3))
    assert abs(logits.mean()) < 0.05 and abs(logits.std() - 1) < 0.05
