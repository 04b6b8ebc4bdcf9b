"""A model's prepare command in small: what test_prepare.py calls, and runs as a script where processes are killed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
import typer
from mindspeed_model_core import cli
from mindspeed_model_core.data.clips import ClipData
from mindspeed_model_core.data.media import Item, read_items
from mindspeed_model_core.data.prepare import prepare
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor


class Videos(ClipData):
    stride: ClassVar[int] = 16
    frame_stride: ClassVar[int] = 4
    encoder_parts: ClassVar[tuple[str, ...]] = ("vae", "text_encoder")
    height: PositiveInt = 32
    width: PositiveInt = 48
    frames: tuple[PositiveInt, ...] = (1, 5, 9)
    fps: PositiveFloat = 16.0
    ratios: tuple[str, ...] = ("3:2", "2:3")
    synthetic: tuple[PositiveInt, PositiveInt, PositiveInt] = (5, 32, 48)


DATA = Videos()


def words(caption: str) -> Tensor:
    return torch.tensor(list(caption.encode()), dtype=torch.bfloat16)[:, None] / 3


def encode(item: Item, frames: Tensor) -> dict[str, Tensor]:
    return {"latents": frames.float().unflatten(3, (-1, 8)).mean((0, 4)) / 7, "text": words(item.caption)}


def run(
    listed: Path,
    folder: Path,
    data: ClipData = DATA,
    *,
    pause: float = 0.0,
    shard_bytes: int = 12_000,
    **settings: Any,
) -> str:
    """Prepare in this process; ``pause`` are seconds that encoding takes, and a rank leaves a sign of its first."""

    seen: list[Item] = []

    def slowly(item: Item, frames: Tensor) -> dict[str, Tensor]:
        if seen and "RANK" in os.environ:
            (folder.parent / f"encoded{os.environ['RANK']}").touch()
        seen.append(item)
        time.sleep(pause)
        return encode(item, frames)

    return prepare(
        read_items(listed, prompt=data.prompt),
        folder,
        data,
        slowly,
        empty_text=lambda: {"text": words(" ")},
        settings={"encoders": "toy", **settings},
        shard_bytes=shard_bytes,
    )


app = cli._new("A model in small.", "toy", "toy")


@app.callback()
def options() -> None: ...


@app.command("prepare")
def command(listed: Path, folder: Path, pause: float = 0.0, on_bad: str = "stop", shard_bytes: int = 12_000) -> None:
    """Prepare; a rank may have a list of its own, as on a host of its own."""
    rank = os.environ["RANK"]
    (folder.parent / f"pid{rank}").write_text(str(os.getpid()))
    data = Videos(on_bad=on_bad)  # type: ignore[arg-type]
    line = run(Path(str(listed).format(rank=rank)), folder, data, pause=pause, shard_bytes=shard_bytes)
    if line:
        (folder.parent / "said").write_text(line)


if __name__ == "__main__":
    typer.main.get_command(app)()
