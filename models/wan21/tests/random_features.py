"""Prepared features for tests: random numbers in the shapes that the prepare command leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mindspeed_model_core.data.features import FeatureWriter, write_index


def write_features(folder: Path, config: Any, grids: Sequence[tuple[int, int, int]]) -> Path:
    """Write a clip for each grid of latents, its text a token longer than the one before; the same ones each time."""
    if folder.exists():
        return folder
    draw = torch.Generator().manual_seed(1)
    with FeatureWriter(folder) as writer:
        for number, grid in enumerate(grids):
            shape = (config.out_channels, *grid)
            tensors = {
                "latents": torch.randn(shape, generator=draw),
                "text": torch.randn(3 + number, config.text_dim, generator=draw),
            }
            if config.image_dim:
                tensors["image"] = torch.randn(5, config.image_dim, generator=draw)
                tensors["condition"] = torch.randn(shape, generator=draw)
            writer.add(f"{number:08d}-clip", tensors)
    write_index(folder, {"conditioning": config.conditioning})
    return folder
