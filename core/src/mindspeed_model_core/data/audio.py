"""Sounds: how long a file is, and its samples as one channel at the rate that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .media import check_file


def seconds(path: str | Path) -> float:
    """Return how long a file's first sound is, from its header, or where that is silent or wrong from its packets.

    UserError for a file that is missing or holds no sound.
    """
    with _sound(Path(path)) as (container, stream):
        if not _understates(Path(path)):
            if stream.duration:
                return float(stream.duration * stream.time_base)
            if container.duration:
                return float(container.duration / 1e6)
        # Not decoded: what is damaged has its length, too.
        return sum(float(each.duration * each.time_base) for each in container.demux(stream) if each.duration)


def read_audio(
    path: str | Path, rate: int, most: float | None = None, *, damaged: Callable[[float], None] | None = None
) -> Tensor:
    """Return a file's first sound, fp32 ``[samples]`` from -1 to 1: channels averaged, resampled to ``rate`` a second.

    Reads whatever FFmpeg does: wav, flac, mp3, ogg, m4a, the sound of a video; all that is there, whatever a header
    says of its length. With ``most`` no more than so many seconds. UserError for a file that is missing, damaged, or
    holds no sound, no sample or one that is no number. With ``damaged``, what cannot be decoded is silence instead, as
    a player has it, and that is told the second of each such packet.
    """
    import av

    path = Path(path)
    parts: list[np.ndarray[Any, Any]] = []
    left, held, whole = None if most is None else round(most * rate), 0, False
    with _sound(path) as (container, stream):
        change = av.AudioResampler(format="fltp", rate=rate)
        for frame in _frames(path, container, stream, damaged):
            if isinstance(frame, float):
                parts.append(np.zeros(round(frame * rate), np.float32))
                held += len(parts[-1])
                continue
            for out in change.resample(frame):
                parts.append(out.to_ndarray().mean(0, dtype=np.float32))
                held += len(parts[-1])
                whole = True
            if left is not None and held >= left:
                break
    samples = np.concatenate(parts)[:left] if whole else np.zeros(0, np.float32)
    if not len(samples):
        raise UserError(f"{path}: holds no sample of sound; it is empty or truncated, leave it out")
    wrong = np.flatnonzero(~np.isfinite(samples))
    if len(wrong):
        raise UserError(
            f"{path}: {len(wrong)} samples are no numbers (NaN or infinite), the first at {wrong[0] / rate:.2f} s; "
            "make the file again"
        )
    return torch.from_numpy(np.ascontiguousarray(samples))


def _frames(path: Path, container: Any, stream: Any, damaged: Callable[[float], None] | None) -> Iterator[Any]:
    """Yield frames, and the seconds of what cannot be decoded where that is allowed."""
    import av

    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            second = float((packet.pts or 0) * packet.time_base)
            if damaged is None:
                raise UserError(
                    f"{path}: not readable sound at {second:.2f} s ({_said(error)}); it is damaged or truncated"
                ) from None
            damaged(second)
            yield float((packet.duration or 0) * packet.time_base)
            continue
        yield from frames
    yield None  # what the resampler still holds


@contextmanager
def _sound(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file's container and first sound; what goes wrong inside is the file's fault."""
    import av

    check_file(path)
    if not path.stat().st_size:
        raise UserError(f"{path}: holds no sample of sound; it is empty or truncated, leave it out")
    try:
        options = {"ignore_length": "1"} if _understates(path) else {}
        with av.open(str(path.absolute()), options=options) as container:  # a colon in a bare name would be a protocol
            if not container.streams.audio:
                raise UserError(f"{path}: holds no sound; give a file such as .wav, .flac or .mp3")
            yield container, container.streams.audio[0]
    except UserError:
        raise
    except (av.FFmpegError, EOFError, ValueError) as error:  # ValueError: the rate or the channels change on the way
        raise UserError(f"{path}: not readable sound ({_said(error)}); it is damaged or truncated") from None


def _said(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split())[:120]


def _understates(path: Path) -> bool:
    """Return whether a wav's header ends its samples before the file does, as a writer leaves it that was stopped.

    What follows the samples is then no chunk: four letters and a size that the file has room for.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return False
        after = False
        while len(chunk := file.read(8)) == 8:
            name, length = chunk[:4], int.from_bytes(chunk[4:], "little")
            if after and not (name.isascii() and name.decode().isprintable() and file.tell() + length <= size):
                return True
            after = after or name == b"data"
            file.seek(length + length % 2, 1)
    return False
