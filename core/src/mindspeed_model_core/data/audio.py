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

_EMPTY = "holds no sample of sound; it is empty or truncated, leave it out"
_TRAILERS = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"cue ", b"smpl", b"inst", b"iXML", b"axml", b"_PMX", b"JUNK", b"PAD ")
"""What follows the samples of a wav, complete or not."""
_UNKNOWN = 0x7FFF0000
"""Bytes from which a wav's header means that its writer, of a stream, did not know the length."""


def seconds(path: str | Path) -> float:
    """Return how long a file's first sound is, from its header, or where that is silent or wrong from its packets.

    UserError for a file that is missing or holds no sound.
    """
    with _sound(Path(path)) as (container, stream):
        length = 0.0
        if not _understates(Path(path)):
            length = float((stream.duration or 0) * stream.time_base) or (container.duration or 0) / 1e6
        # Not decoded: what is damaged has its length, too.
        length = length or sum(float(p.duration * p.time_base) for p in container.demux(stream) if p.duration)
        if not length:
            raise UserError(f"{path}: {_EMPTY}")
        return length


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
        if damaged is None and (lost := _lost(path)):
            raise UserError(f"{path}: ends {lost} bytes before its header says; it is truncated, copy it again")
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
    if damaged is not None and left is None and _lost(path):
        damaged(held / rate)
    samples = np.concatenate(parts)[:left] if whole else np.zeros(0, np.float32)
    if not len(samples):
        raise UserError(f"{path}: {_EMPTY}")
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
        raise UserError(f"{path}: {_EMPTY}")
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

    What follows the samples is then no chunk: four letters and a size that the file has room for, nor the start of one
    that is known, nor a tag.
    """
    size, after = path.stat().st_size, False
    for name, start, length in _chunks(path):
        whole = name.isascii() and name.decode().isprintable() and start + length <= size
        if after and not (whole or name in _TRAILERS or name[:3] == b"TAG"):
            return True
        after = after or name == b"data"
    return False


def _lost(path: Path) -> int:
    """Return how many bytes of samples a wav's header tells of that are not there, as in a file copied in part."""
    for name, start, length in _chunks(path):
        if name == b"data":
            return max(0, start + length - path.stat().st_size) if length < _UNKNOWN else 0
    return 0


def _chunks(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and length of a wav's chunks, as their heads tell."""
    with path.open("rb") as file:
        head = file.read(12)
        while head[:4] == b"RIFF" and head[8:] == b"WAVE" and len(chunk := file.read(8)) == 8:
            start, length = file.tell(), int.from_bytes(chunk[4:], "little")
            yield chunk[:4], start, length
            file.seek(start + length)
            if length % 2 and file.read(1) != b"\0":  # some leave out the byte that makes the length even
                file.seek(start + length)
