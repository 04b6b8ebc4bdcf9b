"""Videos and images: what they are, some of their frames in one size, and how they are written."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import struct
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from .. import launch
from ..errors import UserError
from ..files import publish

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_AVIF = ".avif"
# Pictures that people have and Pillow alone does not open, or not everywhere.
_FOREIGN = (_AVIF, ".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".psd", ".svg")

_GAP = 4  # pixels between the pictures of a contact sheet
_SEEK = 1.0  # seconds below which decoding from the beginning costs less than looking for a key frame
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# What Pillow's decoders raise for files that are damaged.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error)
_FILES = ("path", "video", "image", "file_name")
_CAPTIONS = ("text", "caption", "prompt")
_REFERENCES = ("reference", "source", "control")
_LISTS = ("metadata.jsonl", "metadata.csv")
"""What a folder of images may have its captions in, as the datasets library names it."""


class Denied(UserError):
    """A file that the system does not let be read, which is no fault of the file: it is never left out."""


@dataclass(frozen=True)
class Clip:
    """A video or image as it is shown: upright, with square pixels; an image is one frame at 0 fps."""

    path: Path
    width: int
    height: int
    frames: int
    fps: float

    def length(self, fps: float) -> int:
        """Return how many frames the clip fills when sampled at ``fps``."""
        if self.frames == 1 or not self.fps:
            return 1
        return math.floor((self.frames - 1) / self.fps * fps + 1e-6) + 1


@dataclass(frozen=True)
class Item:
    """A line of a list of clips: its number from 1, the file it names and the file's caption.

    ``written`` is the path as the line has it, and ``where`` the place to name in messages, as ``clips.jsonl:3``. An
    image of a folder that has no list has no line, 0: ``written``, its name, tells it from the others.
    ``reference`` is a second file, from which the first is to be made.
    """

    line: int
    path: Path
    caption: str
    written: str = ""
    where: str = ""
    reference: Path | None = None


@functools.cache
def image_kinds() -> tuple[str, ...]:
    """Return the ends of names of images that can be read here: .avif where Pillow was built with it."""
    from PIL import features

    has_avif = "avif" in features.modules and features.check("avif")  # Pillow before 11.2 does not know the word
    return tuple(sorted((*_IMAGES, _AVIF))) if has_avif else _IMAGES


def holds_images(folder: Path) -> bool:
    """Return whether a folder is one of images, with captions beside them or in a list among them, readable or not."""
    kinds = {*_IMAGES, *_FOREIGN}
    return any((folder / name).is_file() for name in _LISTS) or any(
        file.suffix.lower() in kinds for file in folder.iterdir()
    )


def read_items(path: str | Path, *, prompt: str | None = None, references: bool = False) -> list[Item]:
    """Return the files of a list, or the images of a folder; see ``read_list``.

    A folder has the list in its metadata.jsonl or metadata.csv. One without has a caption in the .txt file of an
    image's name, or ``prompt`` is the caption; it has no references. What else is in it is left out, and the first
    rank says how much of it. Raises UserError as ``read_list`` does, for an image without caption, and for a prompt
    that nothing would use.
    """
    path = Path(path).expanduser()
    listed = next((path / name for name in _LISTS if (path / name).is_file()), None) if path.is_dir() else path
    if listed is not None:
        check_file(listed)
        if prompt is not None:
            raise UserError(f"{listed}: a list has its captions on its lines; leave the prompt {prompt!r} out")
        return read_list(listed, references=references)
    if references:
        raise UserError(f"{path}: pairs of images are listed in a .jsonl or .csv file, or {_LISTS[0]} in their folder")
    images = sorted(file for file in path.iterdir() if is_image(file))
    others = _left_out(path, images)
    if not images:
        raise UserError(f"{path}: holds no image{f', but {others}' if others else ''}; {_advice()}")
    if others and launch.first_rank():
        print(f"{path}: left out: {others}; {_advice()}", file=sys.stderr, flush=True)
    return [Item(0, file, _caption(file, prompt), file.name, str(path)) for file in images]


def _left_out(folder: Path, images: Sequence[Path]) -> str:
    """Return, in words, how many files and folders are neither images nor captions of them, nor hidden."""
    captions = {image.with_suffix(".txt") for image in images}
    others = [
        file for file in folder.iterdir() if not (file.name.startswith(".") or is_image(file) or file in captions)
    ]
    ends = Counter(file.suffix.lower() or "without an ending" for file in others if not file.is_dir())
    folders, files = sum(map(Path.is_dir, others)), ends.total()
    said = [f"{files} file{'s' * (files > 1)} ({', '.join(f'{ends[end]} {end}' for end in sorted(ends))})"] * bool(
        files
    )
    return " and ".join([*said, *[f"{folders} folder{'s' * (folders > 1)}"] * bool(folders)])


def _advice() -> str:
    return f"known are {', '.join(image_kinds())}; convert other pictures to one of these"


def _caption(image: Path, prompt: str | None) -> str:
    beside = image.with_suffix(".txt")
    if beside.is_file():
        try:
            return " ".join(beside.read_text(encoding="utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise UserError(f"{beside}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from None
    if prompt is None:
        raise UserError(f"{image}: no caption; write it to {beside.name}, or give a prompt for all that have none")
    return prompt


def read_list(path: str | Path, *, references: bool = False) -> list[Item]:
    """Return the clips that a .jsonl or .csv file lists; paths in it are relative to its folder.

    A line has the file under ``path``, ``video``, ``image`` or ``file_name``, the caption under ``text``, ``caption``
    or ``prompt``, and with ``references`` the file to start from under ``reference``, ``source`` or ``control``; the
    first line of a .csv names the columns. Raises UserError naming a line that lacks one, has several that differ, or
    more or fewer values than columns.
    """
    path = Path(path).expanduser()
    return [
        Item(
            line,
            path.parent / written,
            column(where, row, _CAPTIONS),
            written,
            where,
            path.parent / column(where, row, _REFERENCES) if references else None,
        )
        for line, where, row in read_rows(path)
        for written in (column(where, row, _FILES),)
    ]


def read_rows(path: Path, *, tabs: bool = False) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield the number, the place to name in messages and the values of each line of a .jsonl or .csv list.

    With ``tabs`` also of a .tsv one, in which quotes are text. Raises UserError for a list that is none or empty.
    """
    kinds = (".jsonl", ".csv", ".tsv") if tabs else (".jsonl", ".csv")
    known = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a list is a {known} file")
    if path.suffix not in kinds and path.exists():
        raise UserError(f"{path}: a list is a {known} file, not {path.suffix or 'a nameless one'}")
    check_file(path)
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, row in _jsonl(file, path) if path.suffix == ".jsonl" else _csv(file, path):
                yield line, f"{path}:{line}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert the file to UTF-8") from None
    if not line:
        raise UserError(f"{path}: lists no file")


def _csv(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    tabs = path.suffix == ".tsv"
    rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(file)
    try:
        columns = next(rows, [])
        for values in rows:
            if len(values) > len(columns):
                raise UserError(
                    f"{path}:{rows.line_num}: {len(values)} values for {len(columns)} columns; quote the caption"
                )
            if values and len(values) < len(columns):
                missing = ", ".join(map(repr, columns[len(values) :]))
                raise UserError(f"{path}:{rows.line_num}: only {len(values)} of {len(columns)} columns; add {missing}")
            if values:
                yield rows.line_num, dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not CSV ({error}); look for a quote that is not closed") from None


def _jsonl(file: TextIO, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}:{line}: not a JSON object ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{line}: expected a JSON object, got {type(row).__name__}")
        yield line, row


def column(where: str, row: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the text that a line of a list has under one of ``names``; UserError for none, or two that differ."""
    given = {name: row[name] for name in names if name in row}
    given = {name: value for name, value in given.items() if value is not None} or given
    for name, value in given.items():
        if not isinstance(value, str):
            raise UserError(f"{where}: {name!r} must hold text, got {type(value).__name__}")
    if len(set(given.values())) > 1:
        both = " and ".join(map(repr, given))
        raise UserError(f"{where}: {both} differ, and either could be meant; leave all but one out")
    if not given:
        joined = any(mark in key for key in row for mark in ";\t")
        advice = "values must be separated by commas" if joined else f"it has {', '.join(row) or 'none'}"
        raise UserError(f"{where}: no key {' or '.join(names)}; {advice}")
    return next(iter(given.values()))


def check_file(path: Path) -> None:
    """Raise UserError for a file that is not there, Denied for one that cannot be opened."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise Denied(f"{path}: cannot be opened: {error.strerror}; make it readable") from None


def is_image(path: str | Path) -> bool:
    """Return whether a file's name is an image's; of an animated one the first picture counts."""
    return Path(path).suffix.lower() in image_kinds()


def probe(path: str | Path) -> Clip:
    """Return what a file holds, from its header and, for a video, its first frame, which alone knows the rotation.

    Raises UserError for a file that is missing or neither a video nor an image, ``Denied`` if it cannot be opened.
    """
    path = Path(path)
    if is_image(path):
        with _image(path) as image:
            width, height = image.size
            if _orientation(image) in _SIDEWAYS:
                width, height = height, width
        return Clip(path, width, height, 1, 0.0)
    with _video(path) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        count = stream.frames or (math.floor(_seconds(container, stream) * fps + 0.5) if fps else 0)
        first = next(container.decode(stream), None)
        if first is None or not fps or not count:
            raise UserError(f"{path}: no frame can be read; the file is damaged or truncated, make it again")
        width, height = _shown(stream, first.width, first.height)
        if first.rotation % 180:
            width, height = height, width
    return Clip(path, width, height, count, fps)


def read_frames(
    path: str | Path, count: int, *, fps: float | None, size: tuple[int, int], offset: float | None = None
) -> Tensor:
    """Return uint8 ``[count, 3, height, width]``: what is shown at ``offset + k / fps`` seconds.

    ``fps`` None is the file's own rate; ``offset`` None takes the middle of the clip. ``size`` is (height, width): a
    frame is scaled until it covers that, keeping its aspect, and cropped at the centre. Frames are chosen by their time
    stamps while decoding; only those chosen are kept. Raises as ``probe`` does, and for a file damaged or too short.
    """
    path = Path(path)
    if is_image(path):
        if count != 1:
            raise UserError(f"{path}: is an image, {count} frames were asked for; an image has 1")
        with _image(path) as image:
            return torch.from_numpy(_fit(_upright(image), size))[None]
    clip = probe(path)
    rate = fps or clip.fps
    have = clip.length(rate)
    if have < count:
        raise UserError(f"{path}: fills {have} frames at {rate:g} fps, {count} were asked for; use a longer clip")
    if offset is None:
        offset = max(0.0, ((clip.frames - 1) / clip.fps - (count - 1) / rate) / 2)
    out = torch.empty((count, 3, *size), dtype=torch.uint8)
    # Containers round time stamps; a frame that comes this little late is still on time.
    times = [offset + k / rate + 0.25 / clip.fps for k in range(count)]
    filled = _fill(out, path, times, 1 / clip.fps, size, seek=offset > _SEEK)
    if filled < 0:  # the key frame found lies behind the beginning
        filled = _fill(out, path, times, 1 / clip.fps, size, seek=False)
    if filled < count:
        raise UserError(
            f"{path}: ends before {offset + filled / rate:.2f} s, though its header tells of {clip.frames} frames at "
            f"{clip.fps:g} fps; the file is truncated, make it again"
        )
    return out


def _fill(out: Tensor, path: Path, times: Sequence[float], duration: float, size: tuple[int, int], seek: bool) -> int:
    """Write the frame shown at each of ``times`` into ``out``; return how many there were, -1 if seeking overshot."""
    at = 0
    with _video(path) as (container, stream):
        if seek:
            container.seek(int((times[0] - duration + _start(stream)) / stream.time_base), stream=stream)
        for number, (frame, begin, end) in enumerate(_spans(container, stream, duration)):
            if seek and not number and begin > times[0]:
                return -1
            chosen = at
            while at < len(times) and times[at] < end:
                at += 1
            if at > chosen:
                if frame.is_corrupt:
                    raise UserError(f"{path}: the frame at {begin:.2f} s is damaged; make the file again")
                out[chosen:at] = torch.from_numpy(_fit(_picture(frame, stream), size))
            if at == len(times):
                break
    return at


def _spans(container: Any, stream: Any, duration: float) -> Iterator[tuple[Any, float, float]]:
    """Yield each frame with the seconds from and to which it is shown; the last stays for ``duration``."""
    start = _start(stream)
    held, begin = None, 0.0
    for frame in container.decode(stream):
        if frame.pts is not None:
            time = float(frame.pts * stream.time_base) - start
            if held is not None:
                yield held, begin, time
            held, begin = frame, time
    if held is not None:
        yield held, begin, begin + 1.25 * duration


def write_video(path: str | Path, frames: Tensor | Iterable[Tensor], fps: float) -> None:
    """Write uint8 frames, each ``[3, height, width]``, as an mp4 (h264, yuv420p); the file appears when it is complete.

    An iterable is consumed frame by frame. Raises UserError for no frames or an odd height or width.
    """
    import av

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(str(draft), "w", format="mp4") as container:
            stream: Any = None
            for frame in frames:
                _, height, width = frame.shape
                if stream is None:
                    if height % 2 or width % 2:
                        raise UserError(f"{path}: {height}x{width} frames; h264 needs an even height and width")
                    stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1001))
                    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                    stream.options = {"crf": "17"}
                pixels = np.ascontiguousarray(frame.permute(1, 2, 0).cpu().numpy())
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            if stream is None:
                raise UserError(f"{path}: no frames to write")
            container.mux(stream.encode(None))
        publish(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_image(path: str | Path, frame: Tensor) -> None:
    """Write a uint8 frame ``[3, height, width]`` as an image of the kind its name says; it appears when complete."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).cpu().numpy())).save(draft)
        publish(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def contact_sheet(path: str | Path, rows: Sequence[Tensor]) -> None:
    """Write rows of frames, each uint8 ``[frames, 3, height, width]``, as one PNG; sizes may differ between rows."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    width = max(_GAP + (row.shape[3] + _GAP) * len(row) for row in rows)
    sheet = Image.new("RGB", (width, _GAP + sum(row.shape[2] + _GAP for row in rows)), "white")
    top = _GAP
    for row in rows:
        for column, frame in enumerate(row):
            picture = Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).cpu().numpy()))
            sheet.paste(picture, (_GAP + column * (row.shape[3] + _GAP), top))
        top += row.shape[2] + _GAP
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        sheet.save(draft, format="PNG")
        publish(draft, path)
    finally:
        draft.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ reading


@contextmanager
def _video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video's container and first video stream; what goes wrong inside is the file's fault."""
    import av

    check_file(path)
    if path.suffix.lower() in _FOREIGN:  # of a tiled picture, FFmpeg may give one tile
        raise UserError(f"{path}: pictures of this kind are not read here; convert it to {_IMAGES[4]} or {_IMAGES[3]}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: holds no video stream; give a video or an image")
            yield container, container.streams.video[0]
    except (av.FFmpegError, EOFError) as error:
        raise UserError(f"{path}: not a readable video ({_reason(error)}); it is damaged or truncated") from None


@contextmanager
def _image(path: Path) -> Iterator[Any]:
    from PIL import Image

    check_file(path)
    # Of damaged EXIF data, of which no more is read than how an image is turned.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
    try:
        with Image.open(path) as image:
            _check_values(path, image)
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(f"{path}: has more than {most:,} pixels; scale it down") from None
    except _BROKEN as error:
        raise UserError(f"{path}: not a readable image ({_reason(error)}); it is damaged or truncated") from None


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.split())[:120]


def _start(stream: Any) -> float:
    return float(stream.start_time * stream.time_base) if stream.start_time else 0.0


def _seconds(container: Any, stream: Any) -> float:
    """Return a video's duration: the stream's, the container's, or, where neither says, that of its packets."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return container.duration / 1e6 - _start(stream)  # a container's, as Matroska's, counts from 0
    ends = [(p.pts + (p.duration or 0)) * stream.time_base for p in container.demux(stream) if p.pts is not None]
    container.seek(0)
    return float(max(ends, default=Fraction(0))) - _start(stream)


def _shown(stream: Any, width: int, height: int) -> tuple[int, int]:
    """Return a frame's size with square pixels."""
    ratio = stream.sample_aspect_ratio
    return (round(width * ratio), height) if ratio else (width, height)


def _picture(frame: Any, stream: Any) -> Any:
    """Return a decoded frame as a Pillow image, with square pixels and upright."""
    from PIL import Image

    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    shown = _shown(stream, *image.size)
    if shown != image.size:
        image = image.resize(shown, Image.Resampling.BICUBIC)
    turns = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
    turn = turns.get(frame.rotation % 360)
    return image if turn is None else image.transpose(turn)


def _check_values(path: Path, image: Any) -> None:
    """Raise UserError for an image whose values do not say what white is."""
    # Pillow before 11.3 opens 16-bit PNGs as I, too.
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise UserError(
            f"{path}: has {kind} values (mode {image.mode}), of which none is white; save it with 8 or 16 bits"
        )


def _orientation(image: Any) -> int | None:
    """Return what an image's EXIF data says of its orientation; None for nothing, or what cannot be read."""
    try:
        return image.getexif().get(_ORIENTATION)  # type: ignore[no-any-return]
    except OSError:  # the image itself, which Pillow reads to find what comes behind it
        raise
    except Exception:  # damaged, and parsers differ in how they say so
        return None


def _upright(image: Any) -> Any:
    """Return an image in RGB, turned as its EXIF data says, transparency on white, 16-bit grey scaled to 8."""
    from PIL import Image

    turn = _TURNS.get(_orientation(image))  # type: ignore[arg-type]
    if turn is not None:
        image = image.transpose(Image.Transpose[turn])
    if image.mode.startswith("I"):
        image = Image.fromarray(
            ((np.asarray(image).astype(np.int64) * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
        )
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _fit(image: Any, size: tuple[int, int]) -> Any:
    """Return uint8 ``[3, height, width]``: the largest centred part with the aspect of ``size``, resampled to it."""
    from PIL import Image

    height, width = size
    scale = min(image.width / width, image.height / height)
    # Products round: the part is not to begin before the image or end behind it.
    wide, high = min(width * scale, image.width), min(height * scale, image.height)
    left, top = (image.width - wide) / 2, (image.height - high) / 2
    box = (left, top, min(left + wide, image.width), min(top + high, image.height))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).transpose(2, 0, 1).copy()
