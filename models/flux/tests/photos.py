"""Real photos for tests: crops of scikit-image's, with captions, and references to make them from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mindspeed_model_core.testing.clips import PHOTOS, pan

SHAPES = ((32, 48), (48, 32), (40, 60), (40, 64), (48, 32), (32, 48))
RATIOS = ("3:2", "2:3")
SIZES = ((32, 48), (48, 32), (32, 48), (32, 48), (48, 32), (32, 48))
"""What the shapes are brought to with these ratios."""


def write_photos(folder: Path, shapes: Sequence[tuple[int, int]] = SHAPES, *, pairs: bool = False) -> Path:
    """Write photos of these heights and widths and their list; return the list's path."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (height, width) in enumerate(shapes):
        photo = PHOTOS[number % len(PHOTOS)]
        frames = pan(photo, 2, height, width)
        row = {"image": f"{number}.png", "text": f"{photo}, number {number}"}
        if pairs:
            row["reference"] = f"{number}-before.png"
        for name, frame in zip((row["image"], row.get("reference")), frames, strict=True):
            if name is not None:
                Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(folder / name)
        rows.append(row)
    listed = folder / "list.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return listed
