"""A run's tensors in PyTorch's distributed checkpoint format, each rank holding rectangles of whole tensors.

Importing this takes seconds (PyTorch's format brings its symbolic shapes along), so ``checkpoint`` does when it must.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
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
from .parallel.shard import Shard

# One process without a group is meant, not an accident. (A scoped filter would not reach the saving thread safely.)
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


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
            items = create_read_items_for_chunk_list(name, saved, wanted.__create_chunk_list__())
            if sum(item.lengths.numel() for item in items) != sum(part.numel() for _, part in wanted.parts):
                raise UserError(f"{name}: the checkpoint does not hold all of it")
            requests += items
        return LoadPlan(requests)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].at(index)


class _Unpickler(pickle.Unpickler):
    """Reads the format's ``.metadata``, a pickle, admitting only the names such a file is made of."""

    modules = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    names = (("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.names:
            return super().find_class(module, name)
        if module in self.modules and "." not in name:
            found = super().find_class(module, name)
            # A module's imports are reachable below it too; only the format's own classes are wanted.
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint never does")


class _Reader(dcp.FileSystemReader):
    """Reads a checkpoint's metadata once, and safely."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.known = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.known


def read_metadata(path: Path) -> Metadata:
    """Return what a checkpoint folder holds; UserError if its ``.metadata`` is missing, damaged or not one."""
    try:
        with (path / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
    except (EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path / '.metadata'}: is truncated or damaged: {' '.join(str(error).split())}") from None
    except Exception as error:
        raise UserError(f"{path / '.metadata'}: cannot be read: {reason(error)}") from None
    if not isinstance(found, Metadata):
        raise UserError(f"{path / '.metadata'}: holds a {type(found).__name__}, not a checkpoint's metadata")
    return found


def save(state: dict[str, Rectangles], folder: Path, group: Any) -> None:
    """Write all ranks' rectangles below ``folder``; ``group`` is None in a single process."""
    dcp.save(
        state,
        storage_writer=dcp.FileSystemWriter(folder, sync_files=True, thread_count=1),
        planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=group,
        no_dist=group is None,
    )


def load(state: dict[str, Rectangles], folder: Path, group: Any) -> None:
    """Fill the rectangles in place from a checkpoint written under any layout."""
    metadata = read_metadata(folder)
    check_files(folder, metadata)
    reader = _Reader(folder, metadata)
    try:
        dcp.load(state, storage_reader=reader, planner=_LoadPlanner(), process_group=group, no_dist=group is None)
    except (Exception, CheckpointException) as error:
        raise UserError(f"{folder}: cannot be loaded: {reason(error)}") from None


def check_files(folder: Path, metadata: Metadata) -> None:
    """Raise UserError unless every data file is there and as long as the metadata says."""
    ends: dict[str, int] = {}
    for part in (metadata.storage_data or {}).values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing; the checkpoint is not whole")
        if file.stat().st_size < end:
            raise UserError(f"{file}: is truncated: {file.stat().st_size} of {end} bytes")


def load_whole(name: str, folder: Path, metadata: Metadata) -> Tensor:
    """Return one whole tensor in the dtype it was saved in."""
    entry = metadata.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)
    if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
        raise UserError(f"{folder}: the checkpoint does not hold all of {name}")
    out = torch.empty(entry.size, dtype=entry.properties.dtype)
    try:
        dcp.load({name: out}, storage_reader=_Reader(folder, metadata), no_dist=True)
    except (Exception, CheckpointException) as error:
        raise UserError(f"{folder}: {name} cannot be loaded: {reason(error)}") from None
    return out


def reason(error: BaseException) -> str:
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
            # A writer that ran out of space says which of its own checks noticed, or that its file is too short.
            if any(sign in str(item) for sign in ("PytorchStreamWriter", "inline_container", "No space left")):
                return "No space left on device"
            item = item.__cause__ or item.__context__
    first = seen[0]
    return f"{type(first).__name__} {' '.join(str(first).split())[:300]}".strip()
