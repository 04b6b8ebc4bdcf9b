"""Encode a list of clips or pictures once, in any number of processes, into a folder that training reads."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from .. import device as devices
from .. import launch
from ..errors import UserError
from ..files import publish, read_json, write_json
from ..recipe import validate
from .ahead import ahead
from .buckets import Bucket
from .clips import BadFiles, PictureData, read_clip, read_reference, usable
from .encoded import EMPTY_TEXT, write_empty_text
from .features import SHARDS, FeatureWriter, done, write_index
from .media import Item
from .ranks import agree, gather

SETTINGS = "settings.json"
"""The file of a prepared folder that says what its samples are made with, and from which list."""

_DRAFT = f".{SETTINGS}.tmp"
_EVERY = 30.0  # seconds between lines that say how far a job is
_AHEAD = 2  # clips decoded while one is encoded
_WAIT = datetime.timedelta(days=7)  # a rank may wait this long for the last clip of another
_DYING = 5.0  # seconds in which the ranks of a launcher that was killed end
_IMAGES = "images"  # the setting that has a mark for each image of a folder
_MARK = 8  # hex digits that stand for a line of the list
GRACE = 60.0
"""Seconds that ranks should have to write what they hold when another ends; see ``launch.spawn``."""

_SKIP = "--on-bad skip"

Destination = Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; give it as data.path.")]
Ratios = Annotated[
    list[str] | None,
    typer.Option("--ratio", metavar="W:H", help=r"An aspect to keep; several times.  \[default: that of the size]"),
]
OnBad = Annotated[str, typer.Option(metavar="[stop|skip]", help="What a file that cannot be used does.")]
ShardSize = Annotated[int, typer.Option(metavar="MB", min=1, help="Size of the files written.")]
NProc = Annotated[str | None, typer.Option(metavar="N", help="Processes on this machine; auto: one per accelerator.")]

D = TypeVar("D", bound=PictureData)
E = TypeVar("E")


def from_options(kind: type[D], values: Mapping[str, Any]) -> D:
    """Return the data section of a command's options, which have its fields' names; a mistake names the option."""
    try:
        return validate(kind, dict(values), "")
    except UserError as error:
        field, said = re.fullmatch(r": (\w+)(?:\.\d+)?(.*)", str(error)).groups()  # type: ignore[union-attr]
        name = "ratio" if field == "ratios" else field.replace("_", "-")
        raise UserError(f"--{name}{said}") from None


def in_processes(nproc: str | None, work: Callable[[], str]) -> None:
    """Run ``work``, which ends in a call of ``prepare``, in so many processes, and print the line it returns."""
    if nproc is not None:
        launch.refuse_nested()
        count = launch.count(nproc)
        if count > 1:
            raise typer.Exit(launch.spawn(count, launch.command_without_nproc(), grace=GRACE))
    line = work()
    if launch.first_rank():
        typer.echo(line)


def open_encoders(kind: Callable[[Path, torch.device], E], folder: Path) -> E:
    """Return the frozen parts that a command's ``--encoders`` names, on the device; a mistake names the option."""
    try:
        return kind(folder.expanduser(), devices.pick())
    except UserError as error:
        raise UserError(f"--{error}") from None  # it begins with the name that the option has, too


class Job:
    """The processes that prepare a folder together: a process group on the host, and counters in its store.

    Without a launcher it is this process alone.
    """

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.store: Any = dist.HashStore()
        if self.world > 1:
            store, self.rank, self.world = next(rendezvous("env://"))
            self.store = dist.PrefixStore("prepare", store)
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.world, timeout=_WAIT)

    def count(self, name: str, amount: int = 1) -> int:
        """Add to a counter of the job; return its new value."""
        return int(self.store.add(name, amount))

    def close(self) -> None:
        """Leave the process group, after an error too: gloo waits for nobody, and aborts a process that did not."""
        if self.world > 1:
            dist.destroy_process_group()


def prepare(
    items: Sequence[Item],
    destination: Path,
    data: PictureData,
    encode: Callable[[Item, Tensor], Mapping[str, Tensor]],
    *,
    empty_text: Callable[[], Mapping[str, Tensor]],
    settings: Mapping[str, Any],
    shard_bytes: int = 512 * 2**20,
) -> str:
    """Encode the items that ``destination`` does not hold yet; return a line that says what was done.

    Every process of a job calls this; items go to whoever is free. ``encode`` makes a sample's tensors of an item and
    its frames, uint8 ``[F, 3, H, W]`` in the shape of its bucket, behind them its reference's; ``empty_text`` those of
    them that an empty caption replaces. ``settings``, which are JSON, and the shapes of ``data`` are what a folder is
    made with. Raises UserError for a folder that holds something else, was made with other settings or from another
    list, or is being written to by another job, for a bad file unless ``data`` skips those, and for a list of which
    nothing can be used. A job that ends early, by an error, SIGTERM or SIGINT, keeps all that it encoded; one that is
    killed, all but what the last five minutes made.
    """
    settings = {**settings, **data.shapes}
    with closing(Job()) as job:
        agree("the list", hashlib.sha256("".join(map(_mark, items)).encode()).hexdigest()[:12])
        if job.rank == 0:
            _begin(destination)
        gather("begun")
        with _Lock(destination) as lock:
            if job.rank == 0:
                lock.take(fcntl.LOCK_EX)
                _claim(destination, settings, items)
                if not (destination / EMPTY_TEXT).is_file():
                    write_empty_text(destination, empty_text())
                lock.take(fcntl.LOCK_SH)
            gather("claimed")
            lock.take(fcntl.LOCK_SH)
            have = set(gather(sorted(done(destination)) if job.rank == 0 else [])[0])

            bad = BadFiles(data.on_bad, _SKIP)
            clips = usable([item for item in items if _key(item) not in have], data, bad)
            begun = time.monotonic()
            with _progress(job, destination, len(clips)) as advance:
                late = _encode(job, clips, destination, data, encode, shard_bytes, advance)
            reasons = [*bad.reasons, *(reason for each in gather(late) for reason in each)]
            if job.rank != 0:
                return ""
            for reason in reasons:
                print(f"skipped: {reason}", file=sys.stderr)
            total = len(done(destination))
            if not total:
                raise UserError(f"{destination}: none of the {counted(len(items))} can be used")
            encoded = total - len(have)
            write_index(destination, {**settings, "samples": total, "skipped": len(reasons)})
    seconds = time.monotonic() - begun
    speed = f", {encoded / seconds:.2f} a second" if encoded else ""
    before = f"; {len(have)} were there" if have else ""
    skipped = f"; {len(reasons)} bad files skipped" if reasons else ""
    return f"{destination}: {counted(encoded)} encoded in {seconds:.0f} s{speed}{before}{skipped}; {total} in all"


def _encode(
    job: Job,
    clips: Sequence[tuple[Item, Bucket]],
    destination: Path,
    data: PictureData,
    encode: Callable[[Item, Tensor], Mapping[str, Tensor]],
    shard_bytes: int,
    advance: Callable[[], None],
) -> list[str]:
    """Encode clips as they come free; return why some could not be."""

    def mine() -> Iterator[tuple[Item, Bucket]]:
        while (number := job.count("next") - 1) < len(clips):
            yield clips[number]

    def read(clip: tuple[Item, Bucket]) -> tuple[Item, Tensor | UserError]:
        try:
            frames = read_clip(*clip, data.rate)
            if clip[0].reference is not None:
                frames = torch.cat((frames, read_reference(*clip, data.rate)))
            return clip[0], frames
        except UserError as error:
            return clip[0], error

    bad = BadFiles(data.on_bad, _SKIP)
    with (
        _telling(job, destination, len(clips)),
        _stoppable(),
        FeatureWriter(destination, f"rank-{job.rank}", shard_bytes=shard_bytes) as writer,
    ):
        for item, frames in ahead(mine(), read, _AHEAD):
            if isinstance(frames, UserError):
                bad.add(frames)
            else:
                # One at a time: a sample's bytes do not depend on which others it was encoded with.
                writer.add(_key(item), encode(item, frames))
            job.count("done")
            advance()
    return list(bad.reasons)


@contextmanager
def _telling(job: Job, folder: Path, total: int) -> Iterator[None]:
    """On the first rank, say of a job that ends early that its work is kept."""
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # a launcher that was killed takes the counters with it
            if job.rank == 0:
                count = f"{job.count('done', 0)} of {counted(total)}"
                print(
                    f"{folder}: stopped at {count}; they are kept, the same command goes on from there", file=sys.stderr
                )
        raise


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let the first SIGTERM or SIGINT end a block by an exception, and no other disturb it on its way out."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not in the main thread: the caller's handlers stay
        before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _key(item: Item) -> str:
    """Return a sample's key: its line keeps equal names apart, its name lets people find it.

    An image of a folder keeps its key when others come before it.
    """
    name = re.sub(r"[^0-9A-Za-z._-]+", "_", item.path.stem)[:80]
    if not item.line:
        return f"{name}-{hashlib.sha256(item.written.encode()).hexdigest()[:_MARK]}"
    return f"{item.line:08d}-{name}"


def _begin(folder: Path) -> None:
    """Make a folder for shards, or find one that a job made, however early it was killed; UserError for another."""
    shards = folder / SHARDS
    if folder.exists() and not (folder / SETTINGS).is_file():
        ours = folder.is_dir() and {path.name for path in folder.iterdir()} <= {SHARDS, _DRAFT}
        if not ours or (shards.exists() and (not shards.is_dir() or any(shards.iterdir()))):
            raise UserError(f"{folder}: exists and is not a prepared folder; name a new one")
    try:
        shards.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: no folder can be made there ({error.strerror}); name another") from None


def _claim(folder: Path, settings: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Write down what a folder is made with, or check that it is the same where it holds anything.

    Lines may be added at a list's end, images anywhere in a folder of them.
    """
    path = folder / SETTINGS
    if not done(folder):
        (folder / EMPTY_TEXT).unlink(missing_ok=True)  # by other settings, it may be
    elif path.is_file():
        try:
            before = read_json(path)
        except UserError as error:
            raise UserError(f"{error}; put it back from a copy, or name a new folder") from None
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"{folder}: was prepared with {name} {before.get(name)}, now it is {value}; "
                    "repeat the settings it has or name a new folder"
                )
        if _of_folder(items) != (_IMAGES in before):
            was, now = ("lines of a list", "a folder of images")[:: 1 if _of_folder(items) else -1]
            raise UserError(f"{folder}: was prepared from {was}, now it is {now}; name a new folder")
        if _of_folder(items):
            _check_images(folder, before[_IMAGES], items)
        else:
            _check_list(folder, before, items)
    if _of_folder(items):
        of: dict[str, Any] = {_IMAGES: {item.written: _mark(item) for item in items}}
    else:
        of = {"listed": "".join(map(_mark, items))}
    write_json(folder / _DRAFT, {**settings, **of})
    publish(folder / _DRAFT, path)


def counted(number: int) -> str:
    """Return how many samples there are, in words."""
    return f"{number} sample{'' if number == 1 else 's'}"


def _of_folder(items: Sequence[Item]) -> bool:
    return bool(items) and not items[0].line


def _check_images(folder: Path, before: Mapping[str, str], items: Sequence[Item]) -> None:
    """Raise UserError for an image that is encoded, and whose caption is another now, or which is no longer there."""
    now, encoded = {item.written: _mark(item) for item in items}, done(folder)
    for name, mark in before.items():
        if now.get(name) != mark and _key(Item(0, Path(name), "", name)) in encoded:
            what = "is another now, or has another caption" if name in now else "is no longer there"
            raise UserError(f"{folder}: holds {name}, which {what}; put that back, or name a new folder")


def _check_list(folder: Path, before: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Raise UserError unless a list begins with the lines that a folder's settings tell of."""
    change = "add lines at its end only, or name a new folder"
    if (
        "list" in before
    ):  # a folder begun before lines had marks of their own: one hash of all, paths as they were typed
        known = int(before.get("lines", 0))
        lines = "\n".join(f"{item.line} {item.path} {item.caption}" for item in items[:known])
        if known > len(items) or before["list"] != hashlib.sha256(lines.encode()).hexdigest()[:16]:
            raise UserError(f"{folder}: was prepared from another list (its first {known} lines differ); {change}")
        return
    marks = str(before.get("listed", ""))
    for number, item in enumerate(items[: len(marks) // _MARK]):
        if marks[number * _MARK : (number + 1) * _MARK] != _mark(item):
            raise UserError(f"{folder}: was prepared from another list ({item.where} differs); {change}")
    if len(marks) > len(items) * _MARK:
        had = counted(len(marks) // _MARK)
        raise UserError(f"{folder}: was prepared from another list (it had {had}, now {len(items)}); {change}")


def _mark(item: Item) -> str:
    """Return hex digits that tell a line, or an image of a folder as it is, from another.

    Paths are as written, so that the list may be moved.
    """
    # Seen from the clip: names alone are alike in folders of, say, edges and depths.
    reference = f" {os.path.relpath(item.reference, item.path.parent)}" if item.reference is not None else ""
    size = f" {item.path.stat().st_size}" if not item.line and item.path.exists() else ""
    return hashlib.sha256(f"{item.line} {item.written} {item.caption}{reference}{size}".encode()).hexdigest()[:_MARK]


class _Lock:
    """Keeps another job out of a folder while a process of this one lives; without effect where files have no locks.

    Two jobs would give their shards the same names, and the later shard would replace the earlier.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.handle = folder, os.open(folder, os.O_RDONLY)

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)

    def take(self, kind: int) -> None:
        """Take the lock or change its kind; UserError if others hold it for longer than it takes them to die."""
        deadline = time.monotonic() + _DYING
        while True:
            try:
                return fcntl.flock(self.handle, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.folder}: another prepare command writes to it; "
                        "wait until that has ended, or name a new folder"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a network file system may have none
                return None


class _progress:
    """Shows on the first rank how many clips of all ranks are done: by a bar, or by lines if that is no terminal."""

    def __init__(self, job: Job, folder: Path, total: int) -> None:
        console = Console(stderr=True)
        self.job, self.folder, self.total, self.lines = job, folder, total, not console.is_terminal
        self.begun = self.said = time.monotonic()
        self.shown = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=job.rank != 0 or self.lines,
        )
        self.task = self.shown.add_task(f"encoding into {folder}", total=total)

    def __enter__(self) -> Callable[[], None]:
        self.shown.start()
        return self._advance

    def __exit__(self, *_: object) -> None:
        self.shown.stop()

    def _advance(self) -> None:
        count = self.job.count("done", 0)
        self.shown.update(self.task, completed=count)
        now = time.monotonic()
        if self.job.rank == 0 and self.lines and now - self.said >= _EVERY:
            self.said = now
            rate = count / (now - self.begun)
            left = datetime.timedelta(seconds=round((self.total - count) / rate))
            print(f"{self.folder}: {count} of {counted(self.total)}, {rate:.2f} a second, {left} left", file=sys.stderr)
