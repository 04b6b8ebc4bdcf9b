"""Prepared features for tests: random numbers in the shapes that the prepare command leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from mindspeed_model_core.data.features import FeatureWriter, write_index
from mindspeed_model_flux import FluxConfig

TEXTS = 8


def write_features(folder: Path, config: FluxConfig, grids: Sequence[tuple[int, int]]) -> Path:
    """Write an image for each grid of latents, all texts alike long; the same ones each time."""
    if folder.exists():
        return folder
    draw = torch.Generator().manual_seed(1)
    with FeatureWriter(folder) as writer:
        for number, grid in enumerate(grids):
            tensors = {
                "latents": torch.randn(config.channels, *grid, generator=draw),
                "text": torch.randn(TEXTS, config.joint_attention_dim, generator=draw),
                "pooled": torch.randn(config.pooled_projection_dim, generator=draw),
            }
            if config.kontext:
                tensors["reference"] = torch.randn(config.channels, *grid, generator=draw)
            writer.add(f"{number:08d}-image", tensors)
    write_index(folder, {})
    return folder
