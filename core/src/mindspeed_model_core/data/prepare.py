"""Encode a list of clips or pictures once, in any number of processes, into a folder that training reads."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..errors import UserError
from ..tensorfile import publish, read_json, write_json
from .buckets import Bucket
from .clips import BadFiles, PictureData, read_clip, usable
from .encoded import EMPTY_TEXT, write_empty_text
from .features import SHARDS, FeatureWriter, done, write_index
from .media import Item

SETTINGS = "settings.json"
"""The file of a prepared folder that says what its samples are made with, and from which list."""

_DRAFT = f".{SETTINGS}.tmp"
_AHEAD = 2  # clips decoded while one is encoded
_WAIT = datetime.timedelta(days=7)  # a rank may wait this long for the last clip of another
_DYING = 5.0  # seconds in which the ranks of a launcher that was killed end
_SKIP = "--on-bad skip"

T = TypeVar("T")
R = TypeVar("R")


class Crew:
    """The processes of one job, which share counters and wait for each other through the store they were started with.

    Without a launcher it is this process alone.
    """

    def __init__(self) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world == 1:
            from torch.distributed import HashStore

            self.store: Any = HashStore()
        else:
            from torch.distributed.rendezvous import rendezvous

            self.store, self.rank, self.world = next(rendezvous("env://"))
        self.store.set_timeout(_WAIT)

    def count(self, name: str, amount: int = 1) -> int:
        """Add to a counter of the crew; return its new value."""
        return int(self.store.add(f"prepare/{name}", amount))

    def meet(self, name: str) -> None:
        """Return when all have come here."""
        if self.count(name) == self.world:
            self.store.set(f"prepare/{name}/all", "1")
        self.store.wait([f"prepare/{name}/all"])

    def gather(self, name: str, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        self.store.set(f"prepare/{name}/{self.rank}", json.dumps(value))
        return [json.loads(self.store.get(f"prepare/{name}/{rank}")) for rank in range(self.world)]


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
    its frames, uint8 ``[F, 3, H, W]`` in the shape of its bucket; ``empty_text`` those of them that an empty caption
    replaces. ``settings``, which are JSON, and the shapes of ``data`` are what a folder is made with. Raises UserError
    for a folder that holds something else, was made with other settings or from another list, or is being written to
    by another job, and for a bad file unless ``data`` skips those.
    """
    crew = Crew()
    settings = {**settings, **data.shapes}
    if crew.rank == 0:
        _begin(destination)
    crew.meet("begun")
    with _Lock(destination) as lock:
        if crew.rank == 0:
            lock.take(fcntl.LOCK_EX)
            _claim(destination, settings, items)
            if not (destination / EMPTY_TEXT).is_file():
                write_empty_text(destination, empty_text())
            lock.take(fcntl.LOCK_SH)
        crew.meet("claimed")
        lock.take(fcntl.LOCK_SH)
        have = done(destination)
        left = [item for item in items if _key(item) not in have]
        crew.meet("counted")

        bad = BadFiles(data.on_bad, _SKIP)
        clips = usable(left, data, bad)  # every rank finds the same
        begun = time.monotonic()
        with _progress(crew, destination, len(clips)) as advance:
            late = _encode(crew, clips, destination, data, encode, shard_bytes, advance)
        reasons = [*bad.reasons, *(reason for each in crew.gather("bad", late) for reason in each)]
        if crew.rank != 0:
            return ""
        encoded = len(clips) - (len(reasons) - len(bad))
        total = len(have) + encoded
        write_index(destination, {**settings, "samples": total, "skipped": len(reasons)})
    for reason in reasons:
        print(f"skipped: {reason}", file=sys.stderr)
    seconds = time.monotonic() - begun
    speed = f", {encoded / seconds:.2f} clips/s" if encoded else ""
    before = f"; {len(have)} were there" if have else ""
    skipped = f"; {len(reasons)} bad files skipped" if reasons else ""
    return f"{destination}: {encoded} clips encoded in {seconds:.0f} s{speed}{before}{skipped}; {total} in all"


def _encode(
    crew: Crew,
    clips: Sequence[tuple[Item, Bucket]],
    destination: Path,
    data: PictureData,
    encode: Callable[[Item, Tensor], Mapping[str, Tensor]],
    shard_bytes: int,
    advance: Callable[[], None],
) -> list[str]:
    """Encode clips as they come free; return why some could not be."""

    def mine() -> Iterator[tuple[Item, Bucket]]:
        while (number := crew.count("next") - 1) < len(clips):
            yield clips[number]

    def read(clip: tuple[Item, Bucket]) -> tuple[Item, Tensor | UserError]:
        try:
            return clip[0], read_clip(*clip, data.rate)
        except UserError as error:
            return clip[0], error

    bad = BadFiles(data.on_bad, _SKIP)
    with FeatureWriter(destination, f"rank-{crew.rank}", shard_bytes=shard_bytes) as writer:
        for item, frames in _ahead(mine(), read):
            if isinstance(frames, UserError):
                bad.add(frames)
            else:
                # One at a time: a sample's bytes do not depend on which others it was encoded with.
                writer.add(_key(item), encode(item, frames))
            crew.count("done")
            advance()
    return list(bad.reasons)


def _ahead(given: Iterable[T], function: Callable[[T], R]) -> Iterator[R]:
    """Yield ``function`` of each in order, working ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[R]] = deque()
        for each in given:
            waiting.append(pool.submit(function, each))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _key(item: Item) -> str:
    """Return a sample's key: its line keeps equal names apart, its name lets people find it."""
    return f"{item.line:08d}-{re.sub(r'[^0-9A-Za-z._-]+', '_', item.path.stem)[:80]}"


def _begin(folder: Path) -> None:
    """Make a folder for shards, or find one that a job made, however early it was killed; UserError for another."""
    shards = folder / SHARDS
    if folder.exists() and not (folder / SETTINGS).is_file():
        ours = folder.is_dir() and {path.name for path in folder.iterdir()} <= {SHARDS, _DRAFT}
        if not ours or (shards.exists() and (not shards.is_dir() or any(shards.iterdir()))):
            raise UserError(f"{folder}: exists and is not a prepared folder; name a new one")
    shards.mkdir(parents=True, exist_ok=True)


def _claim(folder: Path, settings: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Write down what a folder is made with, or check that it is the same; lines may be added at the list's end."""
    path = folder / SETTINGS
    lines = [f"{item.line} {item.path} {item.caption}" for item in items]
    if path.is_file():
        before = read_json(path)
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"{folder}: was prepared with {name} {before.get(name)}, now it is {value}; "
                    "repeat the settings it has or name a new folder"
                )
        known = int(before.get("lines", 0))
        if known > len(lines) or before.get("list") != _hash(lines[:known]):
            raise UserError(
                f"{folder}: was prepared from another list (its first {known} lines differ); "
                "add lines at its end only, or name a new folder"
            )
    write_json(folder / _DRAFT, {**settings, "lines": len(lines), "list": _hash(lines)})
    publish(folder / _DRAFT, path)


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


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
    """Shows on the first rank, on a terminal, how many clips of all ranks are done."""

    def __init__(self, crew: Crew, folder: Path, total: int) -> None:
        console = Console(stderr=True)
        self.crew = crew
        self.shown = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=crew.rank != 0 or not console.is_terminal,
        )
        self.task = self.shown.add_task(f"encoding into {folder}", total=total)

    def __enter__(self) -> Callable[[], None]:
        self.shown.start()
        return lambda: self.shown.update(self.task, completed=self.crew.count("done", 0))

    def __exit__(self, *_: object) -> None:
        self.shown.stop()
