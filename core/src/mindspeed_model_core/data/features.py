"""Encoded samples in sharded safetensors: written once, surviving any kill, and read memory-mapped."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, nearest
from ..files import publish, read_json, save_tensors

INDEX = "index.json"
SHARDS = "shards"

_HANDLES = 64  # shards a reader keeps open
Shape = tuple[int, ...]


class FeatureWriter:
    """Adds samples to a folder; what a shard holds appears at once, complete and on disk, or not at all.

    Samples are held until they make ``shard_bytes``, or the first of them has been held for ``seconds``; then they
    become ``shards/<name>-<number>.safetensors``, numbered on from what is there. A killed process loses the samples it
    held and nothing else. Processes that write at the same time have different names. Use as a context manager; leaving
    it by an exception, too, writes what is held, which are whole samples.
    """

    def __init__(
        self, folder: str | Path, name: str = "rank-0", *, shard_bytes: int = 512 * 2**20, seconds: float = 300
    ) -> None:
        self.folder = Path(folder) / SHARDS
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name, self.shard_bytes, self.seconds = name, shard_bytes, seconds
        self.keys = done(folder)
        taken = [int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"{name}-*.safetensors")]
        self.number = max(taken, default=-1) + 1
        self._held: dict[str, dict[str, Tensor]] = {}
        self._size, self._since = 0, 0.0

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Take one sample; UserError if the folder has ``key`` already."""
        if "/" in key or not key:
            raise ValueError(f"{key!r}: a key is not empty and has no '/'")
        if key in self.keys:
            raise UserError(f"{self.folder.parent}: {key}: is there already; keys must differ")
        # Copies: the caller may go on to use the memory, and a view would keep all of it.
        copies = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        if not self._held:
            self._since = time.monotonic()
        self.keys.add(key)
        self._held[key] = copies  # at once: a signal finds whole samples
        self._size += sum(tensor.nbytes for tensor in copies.values())
        if self._size >= self.shard_bytes or time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write what is held as a shard, and return when it is on disk."""
        if not self._held:
            return
        path = self.folder / f"{self.name}-{self.number:05d}.safetensors"
        draft = path.with_name(f".{path.name}.tmp")
        tensors = {f"{key}/{name}": tensor for key, sample in self._held.items() for name, tensor in sample.items()}
        save_tensors(draft, tensors, {"keys": json.dumps(list(self._held))})
        publish(draft, path)
        self._held, self._size = {}, 0
        self.number += 1

    def close(self) -> None:
        """Write what is still held."""
        self.flush()

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # else what ended the block says more
                raise


def done(folder: str | Path) -> set[str]:
    """Return the keys of all samples that are complete in a folder; UserError names a damaged or doubled shard."""
    return {key for _, keys, _ in _scan(Path(folder)) for key in keys}


def write_index(folder: str | Path, meta: Mapping[str, Any]) -> None:
    """Write ``index.json``: every shard's size, every sample's shard and shapes, and ``meta``, which is JSON.

    Samples are listed by key, so that their order does not depend on who wrote them. What killed writers left behind
    is removed: no writer may be at work.
    """
    folder = Path(folder)
    for draft in (folder / SHARDS).glob(".*.tmp"):
        draft.unlink()
    shards: list[dict[str, Any]] = []
    shapes: dict[str, int] = {}
    samples: dict[str, tuple[int, int]] = {}
    for path, keys, found in _scan(folder):
        shards.append({"file": path.name, "bytes": path.stat().st_size})
        for key in keys:
            kind = json.dumps(found[key], sort_keys=True)
            samples[key] = len(shards) - 1, shapes.setdefault(kind, len(shapes))
    value = {
        "version": 1,
        "meta": dict(meta),
        "shards": shards,
        "shapes": [json.loads(kind) for kind in shapes],
        "samples": {key: list(samples[key]) for key in sorted(samples)},
    }
    draft = folder / f".{INDEX}.tmp"
    with draft.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, separators=(",", ":"))
    publish(draft, folder / INDEX)


class FeatureSet:
    """The samples of a folder by number, in the order of their keys.

    Files are memory-mapped when first read, and worker processes open their own. A folder without an index, where
    writing has not finished, is read from the shards' headers, and its ``meta`` is empty. Raises UserError naming a
    shard that is missing or truncated.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / INDEX
        self.meta: dict[str, Any] = {}
        self._shards: list[str] = []
        self._shapes: list[dict[str, Shape]] = []
        self._samples: list[tuple[str, int, int]] = []
        if index.is_file():
            self._read_index(index)
        else:
            self._read_headers()
        self._open: OrderedDict[int, Any] = OrderedDict()

    @property
    def finished(self) -> bool:
        """Whether the folder has an index."""
        return (self.folder / INDEX).is_file()

    @property
    def keys(self) -> list[str]:
        """Return every sample's key."""
        return [key for key, _, _ in self._samples]

    def __len__(self) -> int:
        return len(self._samples)

    def shapes(self, number: int) -> dict[str, Shape]:
        """Return the shape of each of a sample's tensors, without reading them."""
        return self._shapes[self._samples[number][2]]

    def read(self, number: int) -> dict[str, Tensor]:
        """Return a sample's tensors by name; pages of the file are read as they are used."""
        key, shard, kind = self._samples[number]
        handle = self._handle(shard)
        with _shard(self.folder / SHARDS / self._shards[shard]):
            return {name: handle.get_tensor(f"{key}/{name}") for name in self._shapes[kind]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _handle(self, shard: int) -> Any:
        if shard not in self._open:
            from safetensors import safe_open

            path = self.folder / SHARDS / self._shards[shard]
            with _shard(path):
                self._open[shard] = safe_open(path, framework="pt")
            if len(self._open) > _HANDLES:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _read_index(self, path: Path) -> None:
        try:
            value = read_json(path)
        except UserError as error:
            raise UserError(f"{error}; run the prepare command again") from None
        try:
            sizes = {str(shard["file"]): int(shard["bytes"]) for shard in value["shards"]}
            self._shards = list(sizes)
            self._shapes = [{name: tuple(shape) for name, shape in kind.items()} for kind in value["shapes"]]
            self._samples = [(key, shard, kind) for key, (shard, kind) in value["samples"].items()]
            self.meta = dict(value["meta"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: not an index of features; run the prepare command again") from None
        for name, size in sizes.items():
            shard = self.folder / SHARDS / name
            there = shard.stat().st_size if shard.is_file() else None
            if there is None:
                raise UserError(f"{shard}: missing, though {INDEX} lists it; copy it again")
            if there != size:
                raise UserError(f"{shard}: truncated: {there} bytes, {INDEX} tells of {size}; copy it again")

    def _read_headers(self) -> None:
        if not (self.folder / SHARDS).is_dir():
            siblings = [p.name for p in self.folder.parent.iterdir()] if self.folder.parent.is_dir() else []
            hint = "" if self.folder.is_dir() else nearest(self.folder.name, siblings)
            made = "; the prepare command makes them" if self.folder.is_dir() else ""
            raise UserError(f"{self.folder}: holds no features ({INDEX} and {SHARDS}/ are missing){made}{hint}")
        for path, keys, found in _scan(self.folder):
            for key in keys:
                self._samples.append((key, len(self._shards), len(self._shapes)))
                self._shapes.append(found[key])
            self._shards.append(path.name)
        self._samples.sort()


def _scan(folder: Path) -> Iterator[tuple[Path, list[str], dict[str, dict[str, Shape]]]]:
    """Yield each complete shard, the keys it holds in order, and each key's shapes."""
    from safetensors import safe_open

    seen: set[str] = set()
    for path in sorted((folder / SHARDS).glob("[!.]*.safetensors")):
        found: dict[str, dict[str, Shape]] = {}
        with _shard(path), safe_open(path, framework="pt") as file:
            keys = json.loads((file.metadata() or {}).get("keys", "null"))
            if not isinstance(keys, list):
                raise UserError(f"{path}: is not a shard of features (its header names no keys); move it away")
            for entry in file.keys():  # noqa: SIM118 - not a mapping
                key, _, name = entry.partition("/")
                found.setdefault(key, {})[name] = tuple(file.get_slice(entry).get_shape())
        for key in keys:
            if key in seen:
                raise UserError(f"{path}: {key}: is in another shard too; remove one of them")
            found.setdefault(key, {})
        seen.update(keys)
        yield path, keys, found


@contextmanager
def _shard(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: missing; copy it again") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: truncated or damaged ({reason}); remove it and encode again") from None
