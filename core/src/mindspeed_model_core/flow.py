"""Flow matching (Lipman et al. 2022, arXiv:2210.02747) on a shifted grid of noise levels (Esser et al. 2024).

A noisy sample is ``(1 - sigma) x0 + sigma noise``, the network predicts the velocity ``noise - x0`` at time
``1000 sigma``. Esser et al., arXiv:2403.03206, shift the levels towards noise for large samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from . import device as devices
from .recipe import Section, optional

STEPS = 1000


class FlowConfig(Section):
    """The noise levels training draws from, and how it weighs them."""

    shift: float = Field(5.0, gt=0, description="1: uniform levels; more: towards noise")
    weighting: Literal["gaussian", "none"] = Field("gaussian", description="weight of a level in the loss")
    density: Literal["uniform", "logit-normal"] = optional(
        "uniform", description="how often each level of the grid is drawn; logit-normal: those in the middle most"
    )


def levels(shift: float) -> Tensor:
    """Return the grid of noise levels ``[1000]`` in fp64, from 1 down."""
    even = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)[:-1]
    return shift * even / (1 + (shift - 1) * even)


def weights(sigmas: Tensor, weighting: str) -> Tensor:
    """Return each level's weight in the loss, 1 on average over the grid ``sigmas``."""
    if weighting == "none":
        return torch.ones_like(sigmas)
    bell = torch.exp(-2 * (sigmas - 0.5) ** 2)
    bell = bell - bell.min()
    return bell * (len(sigmas) / bell.sum())


@dataclass(frozen=True)
class Noised:
    """A batch on its way to noise: ``x`` and the velocity to predict in its shape; ``time`` and ``weight [batch]``."""

    x: Tensor
    velocity: Tensor
    time: Tensor
    weight: Tensor


def add_noise(clean: Tensor, seeds: tuple[int, ...], config: FlowConfig) -> Noised:
    """Draw a level and noise for each sample of ``clean [batch, ...]``; a sample's seed alone decides both.

    Drawn on the host, so that they are the same on every device and under every layout.
    """
    grid = levels(config.shift)
    weight = weights(grid, config.weighting)
    noise, places = [], []
    for sample, seed in zip(clean, seeds, strict=True):
        draw = torch.Generator().manual_seed(seed)
        places.append(_place(config.density, draw))
        noise.append(torch.randn(sample.shape, generator=draw))
    device = clean.device
    drawn = devices.send(torch.stack(noise), device)
    clean = clean.to(drawn.dtype)
    sigma, weight = (devices.send(each[places].float(), device) for each in (grid, weight))
    spread = sigma.view(-1, *(1,) * (clean.dim() - 1))
    return Noised((1 - spread) * clean + spread * drawn, drawn - clean, STEPS * sigma, weight)


def _place(density: str, draw: torch.Generator) -> int:
    """Draw a place in the grid; the logit-normal density is that of mean 0 and deviation 1 (Esser et al. 2024)."""
    if density == "uniform":
        return int(torch.randint(STEPS, (), generator=draw))
    return min(int(STEPS * torch.randn((), generator=draw).sigmoid()), STEPS - 1)


def velocity_loss(predicted: Tensor, velocity: Tensor, weight: Tensor) -> Tensor:
    """Return the sum over samples of each one's weighted mean squared error, in fp32 or wider."""
    wide = predicted if predicted.dtype == torch.float64 else predicted.float()
    return ((wide - velocity) ** 2).flatten(1).mean(1).mul(weight).sum()
