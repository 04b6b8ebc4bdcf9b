"""Saves a run so that it resumes exactly, under any parallel layout, whatever kills it.

A checkpoint is a folder ``step-00000010`` of PyTorch's distributed checkpoint format, plus ``run.json``. It is written
under a temporary name and renamed when every rank is done, so a folder with the final name is complete. Values are
the fp32 masters and moments, named and laid out as whole parameters; each rank writes the rectangles it holds.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .errors import UserError
from .optim import AdamW
from .parallel.mesh import Mesh
from .parallel.shard import Shard

RUN_FILE = "run.json"


class Rectangles:
    """A tensor's rectangles on this process, in the terms PyTorch's distributed checkpoint asks for."""

    def __init__(self, local: Tensor, shard: Shard) -> None:
        self.shape = shard.shape
        self.parts = [(torch.Size(at), local[here]) for at, here in shard.rectangles()]
        self.properties = TensorProperties.create_from_tensor(local)

    def copied(self) -> Rectangles:
        """Return the same rectangles over copies of the values, on the host."""
        twin = object.__new__(Rectangles)
        twin.shape, twin.properties = self.shape, self.properties
        twin.parts = [(at, part.detach().to("cpu", copy=True).contiguous()) for at, part in self.parts]
        return twin

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=self.properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=at, sizes=part.size()) for at, part in self.parts]

    def at(self, index: MetadataIndex) -> Tensor:
        """Return the rectangle at an offset."""
        return next(part for at, part in self.parts if at == index.offset)


class _SavePlanner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].at(index)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        requests: list[ReadItem] = []
        for name, wanted in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name) if self.metadata else None
            if not isinstance(saved, TensorStorageMetadata) or saved.size != wanted.shape:
                found = list(saved.size) if isinstance(saved, TensorStorageMetadata) else "missing"
                raise UserError(f"{name}: the network needs {list(wanted.shape)}, in the checkpoint it is {found}")
            requests += create_read_items_for_chunk_list(name, saved, wanted.__create_chunk_list__())
        return LoadPlan(requests)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].at(index)


def _state(shards: dict[str, Shard], optimizer: AdamW | None) -> dict[str, Rectangles]:
    out = {f"model.{name}": Rectangles(s.master, s) for name, s in shards.items()}
    if optimizer is not None:
        for shard in optimizer.shards:
            for key, value in optimizer.moments(shard).items():
                out[f"optim.{shard.name}.{key}"] = Rectangles(value, shard)
    return out


class Checkpointer:
    """Writes checkpoints of one run, in the background if asked, and keeps the newest few."""

    def __init__(self, folder: Path, mesh: Mesh, *, keep: int, background: bool) -> None:
        self.folder, self.mesh, self.keep, self.background = folder, mesh, keep, background
        self.group = dist.new_group(backend="gloo") if mesh.groups else None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        if mesh.rank == 0:
            for torn in folder.glob(".step-*.tmp"):
                shutil.rmtree(torn)

    def save(
        self, step: int, shards: dict[str, Shard], optimizer: AdamW, info: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Save the state as of now as step ``step``; training may change it as soon as this returns.

        Waits for an earlier save. Raises UserError when that one, or with ``wait`` this one, could not be written.
        """
        self.wait()
        state = {key: value.copied() for key, value in _state(shards, optimizer).items()}
        final = self.folder / f"step-{step:08d}"

        def write() -> None:
            try:
                self._write(final, state, {**info, "step": step})
            except BaseException as error:
                self.error = error

        if self.background and not wait:
            self.thread = threading.Thread(target=write, name="checkpoint")
            self.thread.start()
        else:
            write()
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raise UserError if it failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise UserError(f"checkpoint in {self.folder} was not written: {_reason(error)}; older ones are intact")

    def _write(self, final: Path, state: dict[str, Any], info: dict[str, Any]) -> None:
        temporary = final.with_name(f".{final.name}.tmp")
        first = self.mesh.rank == 0
        try:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self._barrier()
            writer = dcp.FileSystemWriter(temporary, sync_files=True, thread_count=1)
            dcp.save(
                state,
                storage_writer=writer,
                planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self.group,
                no_dist=self.group is None,
            )
            if first:
                _write_text(temporary / RUN_FILE, json.dumps(info, indent=1))
                if final.exists():
                    shutil.rmtree(final)
                os.replace(temporary, final)
                _sync_folder(final.parent)
                for old in steps(self.folder)[: -self.keep]:
                    shutil.rmtree(old)
        except BaseException:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._barrier()

    def _barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)


def _reason(error: BaseException) -> str:
    """Return the operating system's reason if there is one below ``error``, on one line."""
    seen: list[BaseException | None] = [error]
    for failure in getattr(error, "failures", {}).values():
        seen.insert(0, failure[0])
    for item in seen:
        while item is not None:
            if isinstance(item, UserError):
                return str(item)
            if isinstance(item, OSError) and item.strerror:
                return item.strerror
            if "PytorchStreamWriter" in str(item) or "No space left" in str(item):
                return "No space left on device"
            item = item.__cause__ or item.__context__
    first = seen[0]
    return f"{type(first).__name__} {' '.join(str(first).split())[:300]}".strip()


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def steps(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / RUN_FILE).is_file()) if folder.is_dir() else []


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint folder, or a run's folder that holds one."""
    return (path / RUN_FILE).is_file() or bool(steps(path / "checkpoints"))


def locate(path: Path) -> Path:
    """Return the checkpoint at ``path``: itself, or the newest of a run's folder."""
    if (path / RUN_FILE).is_file():
        return path
    found = steps(path / "checkpoints")
    if not found:
        raise UserError(f"{path}: neither a checkpoint nor a run's folder with one in checkpoints/")
    return found[-1]


def read_info(path: Path) -> dict[str, Any]:
    """Return what ``run.json`` says of a checkpoint: model, config, recipe, digest, step, data position."""
    try:
        return json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path / RUN_FILE}: cannot be read: {error}") from None


def load(path: Path, shards: dict[str, Shard], optimizer: AdamW, mesh: Mesh) -> dict[str, Any]:
    """Fill masters, moments and parameters from a checkpoint saved under any layout; return its ``run.json``."""
    info = read_info(path)
    state = _state(shards, optimizer)
    try:
        dcp.load(
            state,
            storage_reader=dcp.FileSystemReader(path),
            planner=_LoadPlanner(),
            process_group=mesh.host_group,
            no_dist=not mesh.groups,
        )
    except (Exception, CheckpointException) as error:
        raise UserError(f"{path}: cannot be loaded: {_reason(error)}") from None
    with torch.no_grad():
        for shard in shards.values():
            shard.publish()
    optimizer.resume(int(info["step"]))
    return info


@dataclass
class Weights:
    """The whole parameters of a checkpoint, read one at a time."""

    path: Path
    info: dict[str, Any]
    metadata: Metadata

    @property
    def config(self) -> dict[str, Any]:
        """Return the network's configuration."""
        return self.info["config"]

    def names(self) -> list[str]:
        """Return the parameters' names."""
        return [key.removeprefix("model.") for key in self.metadata.state_dict_metadata if key.startswith("model.")]

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self.metadata.state_dict_metadata[f"model.{name}"]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def shape(self, name: str) -> torch.Size:
        """Return a parameter's whole shape."""
        return self._entry(name).size

    def read(self, name: str) -> Tensor:
        """Return a whole parameter in the dtype it was saved in."""
        out = torch.empty(self.shape(name), dtype=self._entry(name).properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that no process group is up, which is meant
            dcp.load({f"model.{name}": out}, storage_reader=_KnownReader(self.path, self.metadata), no_dist=True)
        return out

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        for name in self.names():
            yield name, lambda name=name: self.read(name)  # type: ignore[misc]


class _KnownReader(dcp.FileSystemReader):
    """Reads the metadata of a large checkpoint once instead of once a tensor."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.known = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.known


def open_weights(path: Path) -> Weights:
    """Open the weights of a checkpoint folder, or of the newest checkpoint in a run's folder."""
    path = locate(path)
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
    except Exception as error:
        raise UserError(f"{path}: damaged checkpoint: {error}") from None
    return Weights(path, read_info(path), metadata)
