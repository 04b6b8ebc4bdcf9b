"""Lists of clips or pictures with captions: the recipe section models share for them, and a reader in buckets."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from .. import launch
from ..errors import UserError
from ..frozen import has_parts
from ..recipe import Recipe, Section, local, optional
from ..trunk import Batch
from .buckets import Bucket, BucketSource, aspect_buckets, fit
from .features import INDEX
from .media import Denied, Item, check_file, holds_images, read_frames, read_items
from .ranks import agree, spread
from .slots import CONTENT, SlotLoader

Sample = dict[str, Any]
Source = Literal["raw", "prepared", "files"]

_LISTED = "data.path (files listed)"
_SHOWN = 5  # bad files named one by one when a run begins


class PictureData(Section):
    """Which pictures a network learns from, and the shapes they are brought to.

    ``path`` is a .jsonl or .csv list of files and captions, a folder of images, a folder made by ``prepare``, or a
    .jsonl list of feature files (.pt). The shapes are those of the first two alone: features have theirs, and those set
    must agree. A model sets its sizes and ``stride``.
    """

    stride: ClassVar[int]
    """Pixels along a side that come to one token: the VAE's stride times the patch."""
    encoder_parts: ClassVar[tuple[str, ...]]
    """The subfolders that tell a folder of encoders."""

    path: str | None = local(None, description="a list of files (.jsonl, .csv), a prepared folder, a list of .pt files")
    prompt: str | None = optional(description="the caption of images in a folder that have none beside them")
    kind: Literal["raw", "features"] | None = local(None, description="what path is; null: what it looks like")
    encoders: str | None = local(
        None, description="the folder with the frozen encoders, as vae/; null: that of init_from"
    )
    height: int
    width: int
    ratios: tuple[str, ...] = Field(
        (), description="aspects that may be kept, as 16:9, at the area of height x width; none: that of both"
    )
    multiple: PositiveInt = Field(16, description="what heights and widths are multiples of")
    text_drop: float = Field(0.0, ge=0, le=1, description="share of samples whose text is empty, for guidance")
    on_bad: Literal["stop", "skip"] = Field("stop", description="what a file that cannot be used does to the run")
    workers: NonNegativeInt = local(0, description="processes that read ahead on each rank; 0: the training process")

    @model_validator(mode="after")
    def _check_sizes(self) -> PictureData:
        if self.multiple % self.stride:
            raise ValueError(
                f"multiple={self.multiple}: must be a multiple of {self.stride}, the VAE's and the patches' stride"
            )
        check_sides({"height": self.height, "width": self.width}, self.multiple)
        for ratio in self.ratios:
            _ratio(ratio)
        return self

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return the (height, width) that files may be brought to."""
        if not self.ratios:
            return ((self.height, self.width),)
        return aspect_buckets(self.height * self.width, self.multiple, [_ratio(r) for r in self.ratios])

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return how many frames samples may have."""
        return (1,)

    @property
    def rate(self) -> float:
        """Return the frames per second that videos are sampled at."""
        return 1.0

    @property
    def shapes(self) -> dict[str, Any]:
        """Return, for JSON, the fields that decide what is read of a file."""
        return {"sizes": [list(size) for size in self.sizes]}

    @property
    def facts(self) -> dict[str, Any]:
        """Return the facts that a saved position in a list of files depends on; see ``SlotLoader``."""
        return {"data.height, width and ratios": [list(size) for size in self.sizes]}

    def source(self) -> tuple[Source, Path]:
        """Return what ``path`` is, and where; UserError if it is not there, or not of the ``kind`` that is set."""
        if self.path is None:
            raise UserError("data.path: this field is required; give a list of files or a prepared folder")
        path = Path(self.path).expanduser()
        if not path.exists():
            raise UserError(f"data.path={self.path}: no such file or folder")
        if path.is_dir() and (path / "data.jsonl").is_file() and not (path / INDEX).is_file():
            path = path / "data.jsonl"
        images = path.is_dir() and not (path / INDEX).is_file() and holds_images(path)
        found: Source = (
            "raw" if images else "prepared" if path.is_dir() else "files" if _lists_features(path) else "raw"
        )
        if self.prompt is not None and not images:
            raise UserError(
                f"data.prompt={self.prompt!r}: is for a folder of images, which {path} is not; leave it out"
            )
        if self.kind is not None and self.kind != ("raw" if found == "raw" else "features"):
            looks = "a list" if found == "raw" else "features"
            raise UserError(f"data.kind={self.kind}: {path} is {looks}; set data.kind=null or another data.path")
        return found, path

    def encoder_folder(self, init_from: str | None) -> str:
        """Return the folder of the encoders: ``encoders``, or ``init_from`` or the folder it is in, if they are there.

        Raises UserError if there are none.
        """
        if self.encoders is not None:
            return self.encoders
        for folder in (Path(init_from), Path(init_from).absolute().parent) if init_from else ():
            if has_parts(folder, self.encoder_parts):
                return str(folder)
        where = f"init_from={init_from} holds none" if init_from else "this field is required without init_from"
        parts = ", ".join(f"{part}/" for part in self.encoder_parts)
        raise UserError(f"data.encoders: {where}; give a folder in diffusers' layout, with {parts}")


class ClipData(PictureData):
    """Which videos and pictures a network learns from; a picture is a clip of one frame.

    A clip gets the longest of ``frames`` that it fills at ``fps``. ``synthetic`` are the frames, height and width of
    measure's random batches. A model sets these, too, and ``frame_stride``.
    """

    frame_stride: ClassVar[int]
    """Frames that come to one latent frame, after the first, which is made of one alone."""

    frames: tuple[PositiveInt, ...]
    fps: PositiveFloat
    synthetic: tuple[PositiveInt, PositiveInt, PositiveInt]

    @model_validator(mode="after")
    def _check_lengths(self) -> ClipData:
        if not self.frames:
            raise ValueError("frames: give one length or more, such as 81")
        step = self.frame_stride
        for name, length in (*(("frames", n) for n in self.frames), ("synthetic", self.synthetic[0])):
            if length % step != 1 % step:
                near = max(0, round((length - 1) / step)) * step + 1
                raise ValueError(f"{name}: {length} is not {step}n + 1; try {near}")
        check_sides({f"synthetic[{i}]": self.synthetic[i] for i in (1, 2)}, self.stride)
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return how many frames samples may have."""
        return self.frames

    @property
    def rate(self) -> float:
        """Return the frames per second that videos are sampled at."""
        return self.fps

    @property
    def shapes(self) -> dict[str, Any]:
        """Return, for JSON, the fields that decide what is read of a file."""
        return {**super().shapes, "frames": sorted(self.frames), "fps": self.fps}

    @property
    def facts(self) -> dict[str, Any]:
        """Return the facts that a saved position in a list of files depends on; see ``SlotLoader``."""
        return {"data.fps": self.fps, "data.frames": list(self.frames), **super().facts}


def check_sides(sides: Mapping[str, int], step: int) -> None:
    """Raise ValueError for a side, by its name, that is not a multiple of ``step``."""
    for name, side in sides.items():
        if side < step or side % step:
            raise ValueError(f"{name}={side}: must be a multiple of {step}; try {max(1, round(side / step)) * step}")


def _ratio(text: str) -> float:
    width, colon, height = text.partition(":")
    try:
        ratio = float(width) / float(height) if colon else float(width)
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratios: {text!r} is not width:height; write 16:9")
    return ratio


def _lists_features(path: Path) -> bool:
    if path.suffix != ".jsonl":
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        return str(json.loads(first).get("file", "")).endswith(".pt")
    except (ValueError, AttributeError):
        return False


class Reader(Protocol):
    """Reads samples by number; picklable."""

    @property
    def keys(self) -> Sequence[Hashable]:
        """Return each sample's bucket."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return the facts that a saved position depends on; see ``SlotLoader``."""
        ...

    def read(self, index: int, seed: int) -> Sample | None:
        """Return a sample, or None for a bad one."""
        ...

    def collate(self, samples: list[Sample]) -> Batch:
        """Return a micro-batch."""
        ...


def open_reader(reader: Reader, recipe: Recipe, rank: int, ranks: int, *, workers: int = 0) -> SlotLoader:
    """Return the loader of a reader's samples for one data rank; see ``BucketSource`` for the order."""
    sizes = {"global_batch": recipe.global_batch, "micro_batch": recipe.micro_batch}
    source = BucketSource(reader.keys, reader.read, seed=recipe.seed, **sizes)
    identity = {"micro_batch": recipe.micro_batch, **reader.identity}
    return SlotLoader(source, reader.collate, rank=rank, ranks=ranks, workers=workers, identity=identity, **sizes)


def content(path: Path) -> dict[str, str]:
    """Return the fact that tells a file's content; UserError unless it is there, and the same on all ranks."""
    check_file(path)
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    found = digest.hexdigest()[:12]
    agree(CONTENT, found)
    return {CONTENT: found}


def _content_of(items: Sequence[Item]) -> dict[str, str]:
    """Return the fact that tells which images a folder holds, and their captions; the same on all ranks."""
    lines = "".join(f"{item.written}\n{item.caption}\n" for item in items)
    found = hashlib.sha256(lines.encode()).hexdigest()[:12]
    agree(CONTENT, found)
    return {CONTENT: found}


def drops_text(seed: int, share: float) -> bool:
    """Return whether the sample of a seed goes without its text; independent of what else is drawn from the seed."""
    digest = hashlib.sha256(f"{seed}/text".encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


class BadFiles:
    """The files that cannot be used: fatal, or named, counted and left out; ``remedy`` is how to ask for the latter."""

    def __init__(self, on_bad: str, remedy: str = "data.on_bad=skip") -> None:
        self.on_bad, self.remedy = on_bad, remedy
        self.reasons: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, error: UserError) -> None:
        """Take note of a file; UserError if it is to stop the run, as one that the system keeps from us always does."""
        if isinstance(error, Denied):
            raise error
        if self.on_bad == "stop":
            raise UserError(f"{error} ({self.remedy} leaves such files out)")
        self.reasons[str(error)] = None

    def found_late(self, error: UserError) -> None:
        """Take note of a file that only reading showed to be bad, and say so once."""
        if str(error) not in self.reasons:
            self.add(error)
            print(f"skipped ({len(self)} so far): {error}", file=sys.stderr, flush=True)

    def report(self, total: int) -> None:
        """Say, on the first rank, which of ``total`` files are left out."""
        if not self.reasons or not launch.first_rank():
            return
        print(f"{len(self)} of {total} files are skipped:", file=sys.stderr)
        for reason in list(self.reasons)[:_SHOWN]:
            print(f"  {reason}", file=sys.stderr)
        if len(self) > _SHOWN:
            print(f"  and {len(self) - _SHOWN} more", file=sys.stderr, flush=True)


def usable(items: Sequence[Item], data: PictureData, bad: BadFiles) -> list[tuple[Item, Bucket]]:
    """Return the items of a list that fit a bucket, each with it, the same on all ranks; the others go to ``bad``."""

    def look(item: Item) -> Bucket:
        with naming(item.where):
            if item.reference is not None:
                fit(item.reference, data.sizes, data.lengths, data.rate)
            return fit(item.path, data.sizes, data.lengths, data.rate)

    found = []
    for item, bucket in zip(items, spread(look, items), strict=True):
        if isinstance(bucket, UserError):
            bad.add(bucket)
        else:
            found.append((item, bucket))
    return found


def read_clip(item: Item, bucket: Bucket, fps: float) -> Tensor:
    """Return a clip's frames in its bucket's shape, uint8 ``[F, 3, H, W]``: from its middle, at ``fps``."""
    return _read(item, item.path, bucket, fps)


def read_reference(item: Item, bucket: Bucket, fps: float) -> Tensor:
    """Return the frames of the file that an item is to be made from, in the item's shape."""
    assert item.reference is not None
    return _read(item, item.reference, bucket, fps)


def _read(item: Item, path: Path, bucket: Bucket, fps: float) -> Tensor:
    with naming(item.where):
        return read_frames(path, bucket.frames, fps=fps, size=(bucket.height, bucket.width))


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say of a mistake inside where in a list its cause is."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{where}: {error}") from None


class Clips:
    """Reads a list of clips or pictures and their captions, or a folder of images.

    A batch holds ``video`` uint8 ``[B, F, 3, H, W]``, ``captions`` and ``seeds``, one number a sample; with
    ``references`` also ``reference``, in the shape of ``video``. Raises UserError for a list of which nothing can be
    used.
    """

    def __init__(self, path: Path, data: PictureData, *, references: bool = False) -> None:
        items = read_items(path, prompt=data.prompt, references=references)
        facts = {_LISTED: len(items), **(content(path) if path.is_file() else _content_of(items))}
        self.bad = BadFiles(data.on_bad)
        self.clips = usable(items, data, self.bad)
        self.bad.report(len(items))
        if not self.clips:
            raise UserError(f"{path}: none of its {len(items)} samples can be used")
        self.keys = [bucket for _, bucket in self.clips]
        self.fps, self.text_drop = data.rate, data.text_drop
        self.identity = {**facts, "data.path (clips that can be used)": len(self.clips), **data.facts}

    def read(self, index: int, seed: int) -> Sample | None:
        """Return a clip's frames and caption, or None if the file is bad."""
        item, bucket = self.clips[index]
        try:
            frames = {"video": read_clip(item, bucket, self.fps)}
            if item.reference is not None:
                frames["reference"] = read_reference(item, bucket, self.fps)
        except UserError as error:
            self.bad.found_late(error)
            return None
        return {**frames, "caption": "" if drops_text(seed, self.text_drop) else item.caption, "seed": seed}

    @staticmethod
    def collate(samples: list[Sample]) -> Batch:
        """Return a micro-batch."""
        frames = [name for name in ("video", "reference") if name in samples[0]]
        return {
            **{name: torch.stack([s[name] for s in samples]) for name in frames},
            "captions": tuple(s["caption"] for s in samples),
            "seeds": tuple(s["seed"] for s in samples),
        }
