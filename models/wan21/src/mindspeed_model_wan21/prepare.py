"""Encode videos, captions and given frames once, into a folder that training reads: ``mindspeed-wan21 prepare``."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from mindspeed_model_core import device as devices
from mindspeed_model_core import launch
from mindspeed_model_core.data.buckets import Bucket
from mindspeed_model_core.data.features import SHARDS, FeatureWriter, done, write_index
from mindspeed_model_core.data.media import Item, read_list
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.recipe import validate
from mindspeed_model_core.tensorfile import read_json, write_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .data import EMPTY_TEXT, BadFiles, WanData, check_frames, read_clip, usable
from .encoders import IMAGE, Encoders, fingerprint

SETTINGS = "settings.json"
_AHEAD = 2  # clips decoded while one is encoded
_WAIT = datetime.timedelta(days=7)  # a rank may wait this long for the last clip of another

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
    source: Path,
    destination: Path,
    encoders: Path,
    data: WanData,
    conditioning: Literal["none", "first", "first-last"] = "none",
    *,
    shard_bytes: int = 512 * 2**20,
) -> str:
    """Encode what a list of clips names and ``destination`` does not hold yet; return a line that says what was done.

    Every process of a job calls this; clips go to whoever is free. A sample is ``latents`` ``[z, T, h, w]`` in fp32,
    ``text`` ``[tokens, width]`` and, with ``conditioning``, ``image`` and ``condition``. Raises UserError for a folder
    that holds something else, or was prepared with other settings, and for a bad file unless ``data`` skips those.
    """
    crew = Crew()
    items = read_list(source)
    check_frames(data, conditioning)
    if conditioning != "none" and not (encoders / IMAGE).is_dir():
        raise UserError(f"--encoders={encoders}: no {IMAGE}/ there, which --conditioning {conditioning} needs")
    opened = Encoders(encoders, devices.pick())
    settings = {
        "encoders": fingerprint(encoders),
        "conditioning": conditioning,
        "sizes": [list(size) for size in data.sizes],
        "frames": sorted(data.frames),
        "fps": data.fps,
    }
    if crew.rank == 0:
        _claim(destination, settings, items)
        _write_empty_text(destination, opened)
    crew.meet("claimed")
    have = done(destination)
    left = [item for item in items if _key(item) not in have]
    crew.meet("counted")

    bad = BadFiles(data.on_bad)
    clips = usable(left, data, bad)  # every rank finds the same
    begun = time.monotonic()
    with _progress(crew, destination, len(clips)) as advance:
        late = _encode(crew, opened, clips, destination, data, conditioning, shard_bytes, advance)
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
    encoders: Encoders,
    clips: Sequence[tuple[Item, Bucket]],
    destination: Path,
    data: WanData,
    conditioning: str,
    shard_bytes: int,
    advance: Callable[[], None],
) -> list[str]:
    """Encode clips as they come free; return why some could not be."""

    def mine() -> Iterator[tuple[Item, Bucket]]:
        while (number := crew.count("next") - 1) < len(clips):
            yield clips[number]

    def read(clip: tuple[Item, Bucket]) -> tuple[Item, Tensor | UserError]:
        try:
            return clip[0], read_clip(*clip, data.fps)
        except UserError as error:
            return clip[0], error

    bad = BadFiles(data.on_bad)
    with FeatureWriter(destination, f"rank-{crew.rank}", shard_bytes=shard_bytes) as writer:
        for item, video in _ahead(mine(), read):
            if isinstance(video, UserError):
                bad.add(str(video))
            else:
                # One at a time: a sample's bytes do not depend on which others it was encoded with.
                sample = {"latents": encoders.video(video[None]), **encoders.given(video[None], conditioning)}
                tensors = {name: tensor[0] for name, tensor in sample.items()}
                writer.add(_key(item), {**tensors, "text": encoders.text_rows([item.caption])[0]})
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


def _claim(folder: Path, settings: dict[str, Any], items: Sequence[Item]) -> None:
    """Begin a folder, or check that it was begun with the same settings and list; lines may be added at the end."""
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
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a prepared folder; name a new one")
    (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    draft = folder / f".{SETTINGS}.tmp"
    write_json(draft, {**settings, "lines": len(lines), "list": _hash(lines)})
    os.replace(draft, path)


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _write_empty_text(folder: Path, encoders: Encoders) -> None:
    if (folder / EMPTY_TEXT).is_file():
        return
    from safetensors.torch import save_file

    draft = folder / f".{EMPTY_TEXT}.tmp"
    save_file({"text": encoders.text_rows([""])[0].cpu().contiguous()}, draft)
    os.replace(draft, folder / EMPTY_TEXT)


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


def prepare_command(
    source: Annotated[
        Path, typer.Argument(metavar="LIST", help="A .jsonl or .csv file: path and caption of a clip on each line.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; give it as data.path.")],
    encoders: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder with vae/, text_encoder/, tokenizer/ and image_encoder/.")
    ],
    height: Annotated[int, typer.Option(metavar="N", help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(metavar="N", help="Pixels.")] = 832,
    frames: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="A length, 4n + 1; several times: the longest filled.  \\[default: 81]"),
    ] = None,
    fps: Annotated[float, typer.Option(metavar="F", help="Frames per second clips are sampled at.")] = 16.0,
    ratio: Annotated[
        list[str] | None,
        typer.Option(metavar="W:H", help="An aspect clips may keep; several times.  \\[default: that of the size]"),
    ] = None,
    conditioning: Annotated[
        Literal["none", "first", "first-last"], typer.Option(help="Frames given to the network, for image-to-video.")
    ] = "none",
    on_bad: Annotated[Literal["stop", "skip"], typer.Option(help="What a file that cannot be used does.")] = "stop",
    shard_size: Annotated[int, typer.Option(metavar="MB", min=1, help="Size of the files written.")] = 512,
    nproc: Annotated[
        str | None, typer.Option(metavar="N", help="Processes on this machine; auto: one per accelerator.")
    ] = None,
) -> None:
    """Encode a list of clips once, so that training reads features and no encoder runs in it.

    Stopped or killed, the same command goes on where it was: what is done is kept, nothing is done twice. Lines may be
    added to the list and the command run again.

    $ mindspeed-wan21 prepare clips.jsonl features --encoders Wan2.1-T2V-1.3B-Diffusers --nproc auto

    $ mindspeed-wan21 train NAME data.path=features
    """
    data = validate(
        WanData,
        {
            "height": height,
            "width": width,
            "frames": tuple(frames or (81,)),
            "fps": fps,
            "ratios": tuple(ratio or ()),
            "on_bad": on_bad,
        },
        "prepare",
    )
    if nproc is not None:
        launch.refuse_nested()
        count = launch.count(nproc)
        if count > 1:
            raise typer.Exit(launch.spawn(count, launch.command_without_nproc()))
    done_line = prepare(source, destination, encoders, data, conditioning, shard_bytes=shard_size * 10**6)
    if launch.first_rank():
        typer.echo(done_line)
