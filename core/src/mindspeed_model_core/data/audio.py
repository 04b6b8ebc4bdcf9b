"""Sounds: how long a file is, and its samples as one channel at the rate that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .media import check_file


def seconds(path: str | Path) -> float:
    """Return how long a file's first sound is, from its header, or where that is silent from its samples.

    UserError for a file that is missing or holds no sound.
    """
    with _sound(Path(path)) as (container, stream):
        if stream.duration:
            return float(stream.duration * stream.time_base)
        if container.duration:
            return float(container.duration / 1e6)
        return sum(frame.samples / frame.sample_rate for frame in container.decode(stream))


def read_audio(path: str | Path, rate: int, most: float | None = None) -> Tensor:
    """Return a file's first sound, fp32 ``[samples]`` from -1 to 1: channels averaged, resampled to ``rate`` a second.

    Reads whatever FFmpeg does: wav, flac, mp3, ogg, m4a, the sound of a video. With ``most`` no more than so many
    seconds. UserError for a file that is missing, damaged, or holds no sound or no sample.
    """
    import av

    path = Path(path)
    parts: list[np.ndarray[Any, Any]] = []
    left, held = None if most is None else round(most * rate), 0
    with _sound(path) as (container, stream):
        change = av.AudioResampler(format="fltp", rate=rate)
        for frame in _frames(container, stream):
            for out in change.resample(frame):
                parts.append(out.to_ndarray().mean(0, dtype=np.float32))
                held += len(parts[-1])
            if left is not None and held >= left:
                break
    samples = np.concatenate(parts)[:left] if parts else np.zeros(0, np.float32)
    if not len(samples):
        raise UserError(f"{path}: holds no sample of sound; it is empty or truncated, leave it out")
    return torch.from_numpy(np.ascontiguousarray(samples))


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    yield from container.decode(stream)
    yield None  # what the resampler still holds


@contextmanager
def _sound(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file's container and first sound; what goes wrong inside is the file's fault."""
    import av

    check_file(path)
    if not path.stat().st_size:
        raise UserError(f"{path}: holds no sample of sound; it is empty or truncated, leave it out")
    try:
        with av.open(str(path.absolute())) as container:  # a colon in a bare name would be a protocol
            if not container.streams.audio:
                raise UserError(f"{path}: holds no sound; give a file such as .wav, .flac or .mp3")
            yield container, container.streams.audio[0]
    except UserError:
        raise
    except (av.FFmpegError, EOFError, ValueError) as error:  # ValueError: the rate or the channels change on the way
        said = " ".join((getattr(error, "strerror", None) or str(error)).split())[:120]
        raise UserError(f"{path}: not readable sound ({said}); it is damaged or truncated") from None
