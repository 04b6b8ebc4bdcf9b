"""Real clips for tests, windows that move over photos, and what tests of their readers share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.media import write_video
from ..data.slots import SlotLoader
from ..trunk import Batch

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")


def pan(photo: str, frames: int, height: int, width: int) -> Tensor:
    """Return a window moving right over one of scikit-image's photos, uint8 ``[F, 3, H, W]``."""
    import skimage.data

    pixels = torch.from_numpy(getattr(skimage.data, photo)()).permute(2, 0, 1)
    return torch.stack([pixels[:, 40 : 40 + height, 60 + 2 * i : 60 + 2 * i + width] for i in range(frames)])


def write_clips(folder: Path, shapes: Sequence[tuple[int, int, int]]) -> Path:
    """Write a clip of each (frames, height, width), of 1 frame a PNG, and the list; return the list's path."""
    from PIL import Image

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


def drawn(loaders: Sequence[SlotLoader], steps: int) -> Iterator[list[Batch]]:
    """Yield each step's micro-batches of all data ranks, in the order of their slots."""
    iterators = [iter(each) for each in loaders]
    for _ in range(steps):
        per_rank = [next(iterator) for iterator in iterators]
        yield [batch for group in zip(*per_rank, strict=True) for batch in group]


def equal(a: Any, b: Any) -> bool:
    """Return whether two nests of dicts, lists and tensors hold the same."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
