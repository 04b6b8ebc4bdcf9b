"""Flow matching (Lipman et al. 2022, arXiv:2210.02747) on a shifted grid of noise levels (Esser et al. 2024): a task.

A noisy sample is ``(1 - sigma) x0 + sigma noise``, the network predicts the velocity ``noise - x0`` at time
``1000 sigma``. Esser et al., arXiv:2403.03206, shift the levels towards noise for large samples.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from . import device as devices
from .frozen import FrozenParts, check_parts
from .recipe import Section, optional
from .task import Loader, Unit, Work
from .trunk import Batch

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


class FlowTask(ABC):
    """Predict ``noise - latents`` at a random noise level; each sample counts once, with its own level's weight.

    ``recipe`` has a section ``flow`` and data with ``encoders``. A model says how its data is opened, what its network
    reads besides noisy latents, and its FLOPs.
    """

    unit: Unit = "samples"
    encoders: ClassVar[type[FrozenParts]]

    def __init__(self, recipe: Any, config: Any) -> None:
        self.recipe, self.config = recipe, config

    @abstractmethod
    def open(self, rank: int, ranks: int) -> Loader:
        """Return the loader of the recipe's data for one data rank: raw ``video`` or prepared ``latents``."""

    @abstractmethod
    def synthetic(self, rank: int, ranks: int) -> Loader:
        """Return the loader of random latents and conditions of the recipe's size."""

    @abstractmethod
    def encoded(self, encoders: Any, batch: Batch) -> Batch:
        """Return ``latents``, conditions and ``seeds`` of a raw batch."""

    @abstractmethod
    def inputs(self, noised: Noised, batch: Batch) -> Batch:
        """Return what the network reads at ``noised.x`` and ``noised.time``, given a batch of latents."""

    @abstractmethod
    def work(self, batch: Batch) -> Work:
        """Return samples, units and training FLOPs, those of the network alone."""

    def data(self, rank: int, ranks: int) -> Loader:
        """Open the recipe's samples, or what was prepared of them, for one data rank."""
        if self.recipe.data.encoders is not None:
            # Features need none, but what is exported of the run has them from there.
            check_parts(self.recipe.data.encoders, self.encoders.needed, "data.encoders=")
        return self.open(rank, ranks)

    def encode(self, batch: Batch) -> Batch:
        """Encode samples and captions if they are not yet, then add noise, and all that the network is given."""
        if "video" in batch:
            batch = self.encoded(self._encoders(batch["video"].device), batch)
        noised = add_noise(batch["latents"], batch["seeds"], self.recipe.flow)
        return {**self.inputs(noised, batch), "velocity": noised.velocity, "weight": noised.weight}

    @functools.cache  # noqa: B019  (a task lives as long as its run)
    def _encoders(self, device: torch.device) -> FrozenParts:
        return self.encoders(self.recipe.data.encoder_folder(self.recipe.init_from), device)

    def count(self, batch: Batch) -> int:
        """Return the number of samples."""
        return len(batch["seeds"]) if "seeds" in batch else len(batch["x"])

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the sum over samples of the weighted mean squared error."""
        return velocity_loss(output, batch["velocity"], batch["weight"])
