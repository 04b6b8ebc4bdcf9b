"""The bytes of a file, in samples whose order depends on no layout and resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import Section, local
from mindspeed_model_core.trunk import Batch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

Bytes = NDArray[np.uint8]


class TemplateData(Section):
    """Which file the network learns from, and how long a sample is."""

    path: str | None = local(None, description="a file; its bytes are the text")
    sequence_length: PositiveInt = Field(64, description="bytes predicted per sample")


def load_bytes(data: TemplateData, window: int, samples: int) -> Bytes:
    """Return the file's bytes after ``window`` zeros; UserError for no file, or one with fewer than ``samples``."""
    if data.path is None:
        raise UserError("data.path: this field is required; give a file, data.path=book.txt")
    path = Path(data.path)
    if not path.is_file():
        raise UserError(f"data.path={data.path}: no such file")
    text = np.fromfile(path, np.uint8)
    if len(text) < samples * data.sequence_length:
        raise UserError(
            f"data.path={data.path}: {len(text)} bytes are fewer than global_batch={samples} samples of "
            f"data.sequence_length={data.sequence_length}; lower either, or give more text"
        )
    return np.concatenate((np.zeros(window, np.uint8), text))


class ByteText:
    """Gives slot s the samples s, s + slots, ... of each epoch's order; a position is (epoch, place in the order)."""

    def __init__(self, text: Bytes, window: int, length: int, slots: int, seed: int) -> None:
        self.text, self.window, self.length, self.slots, self.seed = text, window, length, slots, seed
        self.samples = (len(text) - window) // length

    def start(self, slot: int) -> list[int]:
        """Return where a slot begins."""
        return [0, slot]

    def stream(self, slot: int, position: list[int]) -> Iterator[tuple[Bytes, list[int]]]:
        """Yield ``[window + length]`` bytes and the position after them, without end."""
        epoch, place = position
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
            while place < self.samples:
                begin = int(order[place]) * self.length
                place += self.slots
                yield self.text[begin : begin + self.window + self.length], [epoch, place]
            epoch, place = epoch + 1, slot


class RandomBytes:
    """Random samples of the same shape, to measure with; a position is the number of samples drawn."""

    def __init__(self, window: int, length: int, seed: int) -> None:
        self.size, self.seed = window + length, seed

    def start(self, slot: int) -> list[int]:
        """Return where a slot begins."""
        return [0]

    def stream(self, slot: int, position: list[int]) -> Iterator[tuple[Bytes, list[int]]]:
        """Yield ``[window + length]`` random bytes and the position after them, without end."""
        (drawn,) = position
        while True:
            draw = np.random.default_rng([self.seed, slot, drawn])
            drawn += 1
            yield draw.integers(256, size=self.size, dtype=np.uint8), [drawn]


def collate(samples: list[Bytes], window: int) -> Batch:
    """Return ``before`` ``[window, tokens]``, the nearest byte first, and ``labels`` ``[tokens]`` of all samples."""
    rows = torch.from_numpy(np.stack(samples).astype(np.int64))
    length = rows.shape[1] - window
    before = [rows[:, window - 1 - distance :][:, :length].flatten() for distance in range(window)]
    return {"before": torch.stack(before), "labels": rows[:, window:].flatten()}
