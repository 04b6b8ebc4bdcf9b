"""Real clips for tests: windows that move over photos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import skimage.data
import torch
from mindspeed_model_core.data.media import write_video
from PIL import Image
from torch import Tensor

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")


def pan(photo: str, frames: int, height: int, width: int) -> Tensor:
    """Return a window moving right over a photo, uint8 ``[F, 3, H, W]``."""
    pixels = torch.from_numpy(getattr(skimage.data, photo)()).permute(2, 0, 1)
    return torch.stack([pixels[:, 40 : 40 + height, 60 + 2 * i : 60 + 2 * i + width] for i in range(frames)])


def write_clips(folder: Path, shapes: Sequence[tuple[int, int, int]]) -> Path:
    """Write a clip of each (frames, height, width), of 1 frame a PNG, and the list; return the list's path."""
    rows: list[dict[str, Any]] = []
    for number, (frames, height, width) in enumerate(shapes):
        photo = PHOTOS[number % len(PHOTOS)]
        clip = pan(photo, frames, height, width)
        # One name in many folders: names are no keys.
        path = folder / f"part-{number}" / ("clip.png" if frames == 1 else "clip.mp4")
        path.parent.mkdir(parents=True)
        if frames == 1:
            Image.fromarray(clip[0].permute(1, 2, 0).contiguous().numpy()).save(path)
        else:
            write_video(path, clip, 16)
        rows.append({"path": str(path.relative_to(folder)), "text": f"{photo}, number {number}"})
    listed = folder / "clips.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return listed
