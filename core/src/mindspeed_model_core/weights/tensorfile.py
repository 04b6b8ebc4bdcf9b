"""Files of tensors, read and written piece by piece: safetensors.

None is ever held in memory: a reader takes the byte ranges it needs, a writer lays the file out first and fills it in
any order, from any thread.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_json, write_json

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 8 << 20  # bytes moved at once when a tensor is copied unread
_BLOCK = 32 << 20  # bytes of rows held while columns are cut out of them
_HEADER_LIMIT = 100_000_000  # the safetensors format's own limit
_local = threading.local()


@dataclass(frozen=True)
class Spec:
    """A tensor's type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the tensor's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class File:
    """An open file with positioned reads and writes that threads may share."""

    fd = -1

    def __init__(self, path: Path, *, write: bool = False) -> None:
        self.path = path
        if write:
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            return
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    @property
    def size(self) -> int:
        """Return the file's length in bytes."""
        return os.fstat(self.fd).st_size

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset``; UserError if the file ends before."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
            if count == 0:
                raise UserError(f"{self.path}: truncated: ends at byte {offset + done}; download or copy it again")
            done += count

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``."""
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def write(self, view: memoryview | bytes, offset: int) -> None:
        """Write all of ``view`` at ``offset``; OSError as the system gives it."""
        view, done = memoryview(view), 0
        while done < len(view):
            done += os.pwrite(self.fd, view[done:], offset + done)

    def close(self) -> None:
        """Close the file; once more does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class Slot:
    """The byte range of one file that holds one tensor, contiguous and row-major."""

    file: File
    spec: Spec
    offset: int

    def read(self, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """Return the tensor, or its ``length`` indices from ``start`` along ``dim``, reading whole rows at most."""
        shape, dtype = self.spec.shape, self.spec.dtype
        if length is None:
            out = torch.empty(shape, dtype=dtype)
            self.file.read_into(_bytes(out), self.offset)
            return out
        out = torch.empty((*shape[:dim], length, *shape[dim + 1 :]), dtype=dtype)
        tail = math.prod(shape[dim + 1 :])
        row = shape[dim] * tail
        if dim == 0:
            self.file.read_into(_bytes(out), self.offset + start * tail * dtype.itemsize)
            return out
        rows = math.prod(shape[:dim])
        flat = out.view(rows, length * tail)
        step = max(1, _BLOCK // max(1, row * dtype.itemsize))
        block = torch.empty((min(step, rows), row), dtype=dtype)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            self.file.read_into(_bytes(block[:count]), self.offset + first * row * dtype.itemsize)
            flat[first : first + count] = block[:count, start * tail : (start + length) * tail]
        return out


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class Reader:
    """Tensors by name over one or several files; a name's slots are cut from the whole along its ``dim``."""

    def __init__(self, slots: Mapping[str, tuple[list[Slot], int]]) -> None:
        self.slots = dict(slots)

    def names(self) -> list[str]:
        """Return every tensor's name."""
        return list(self.slots)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""
        return self.slots[name][0][0].spec.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's whole shape."""
        slots, dim = self.slots[name]
        shape = list(slots[0].spec.shape)
        if len(slots) > 1:
            shape[dim] = sum(s.spec.shape[dim] for s in slots)
        return tuple(shape)

    def where(self, name: str) -> Path:
        """Return the (first) file that holds a tensor."""
        return self.slots[name][0][0].file.path

    def slot(self, name: str) -> Slot | None:
        """Return where the whole tensor's bytes lie in one piece, or None if they are cut."""
        slots, _ = self.slots[name]
        return slots[0] if len(slots) == 1 else None

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> Tensor:
        """Return a tensor, or its ``length`` indices from ``start`` along ``dim``."""
        slots, cut = self.slots[name]
        if len(slots) == 1:
            return slots[0].read(dim, start, length)
        if length is None or dim != cut:
            return torch.cat([s.read(dim, start, length) for s in slots], cut)
        parts, base = [], 0
        for slot in slots:
            size = slot.spec.shape[cut]
            low, high = max(start, base), min(start + length, base + size)
            if low < high:
                parts.append(slot.read(cut, low - base, high - low))
            base += size
        return parts[0] if len(parts) == 1 else torch.cat(parts, cut)


class Writer:
    """Files laid out beforehand whose tensors are filled in any order; more than one slot: cut along ``dim``.

    A negative ``dim`` repeats the whole tensor in every slot.
    """

    def __init__(
        self,
        files: Iterable[File],
        slots: Mapping[str, tuple[list[Slot], int]],
        seal: Callable[[dict[Slot, int]], None] | None = None,
    ) -> None:
        self.files, self.slots = tuple(files), dict(slots)
        self._left = set(self.slots)
        self._seal, self._sums = seal, dict[Slot, int]()

    def slot(self, name: str) -> Slot | None:
        """Return the tensor's byte range when there is only one."""
        slots, _ = self.slots[name]
        return slots[0] if len(slots) == 1 else None

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one whole tensor, cutting it over its slots."""
        slots, dim = self.slots[name]
        start = 0
        for slot in slots:
            share = tensor
            if len(slots) > 1 and dim >= 0:
                share = tensor.narrow(dim, start, slot.spec.shape[dim])
                start += slot.spec.shape[dim]
            if tuple(share.shape) != slot.spec.shape or share.dtype != slot.spec.dtype:
                raise ValueError(f"{name}: {share.dtype}{tuple(share.shape)} does not fit {slot.spec}")
            view = _bytes(share.contiguous())
            slot.file.write(view, slot.offset)
            if self._seal:
                self._sums[slot] = zlib.crc32(view)
        self._left.discard(name)

    def copy(self, name: str, source: Slot) -> None:
        """Copy a tensor's bytes from another file, without making a tensor of them."""
        slots, dim = self.slots[name]
        if (len(slots) > 1 and dim >= 0) or source.spec != slots[0].spec:
            raise ValueError(f"{name}: {source.spec} cannot be copied into {len(slots)} x {slots[0].spec}")
        if not hasattr(_local, "chunk"):
            _local.chunk = np.empty(_CHUNK, dtype=np.uint8)
        total, done, crc = source.spec.nbytes, 0, 0
        while done < total:
            view = memoryview(_local.chunk)[: min(_CHUNK, total - done)]
            source.file.read_into(view, source.offset + done)
            for slot in slots:
                slot.file.write(view, slot.offset + done)
            crc = zlib.crc32(view, crc) if self._seal else 0
            done += len(view)
        self._sums.update(dict.fromkeys(slots, crc) if self._seal else {})
        self._left.discard(name)

    def finish(self) -> None:
        """Complete the files and put them on disk; ValueError if a tensor was never written."""
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were never written, first {min(self._left)!r}")
        if self._seal:
            self._seal(self._sums)
        for file in self.files:
            os.fsync(file.fd)
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()


def open_safetensors(path: Path) -> dict[str, Slot]:
    """Return every tensor's byte range; UserError if the header is broken or the file shorter than it says."""
    file = File(path)
    size = file.size
    if size < 8:
        raise UserError(f"{path}: truncated: {size} bytes hold no safetensors header; download or copy it again")
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > _HEADER_LIMIT:
        raise UserError(f"{path}: not a safetensors file (its header claims {length} bytes)")
    base = 8 + length
    if base > size:
        raise UserError(f"{path}: truncated: {size} bytes, its header alone needs {base}; download or copy it again")
    try:
        header = json.loads(file.read(8, length))
        header.pop("__metadata__", None)
        entries = {}
        for name, entry in header.items():
            start, stop = (int(n) for n in entry["data_offsets"])
            entries[name] = str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), start, stop
        end = max((stop for *_, stop in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a safetensors file (its header is not readable)") from None
    if base + end > size:
        raise UserError(f"{path}: truncated: {size} bytes, its header asks for {base + end}; download or copy it again")
    slots = {}
    for name, (code, shape, start, stop) in entries.items():
        if code not in DTYPES:
            raise UserError(f"{path}: {name}: type {code} is not supported (known: {', '.join(DTYPES)})")
        spec = Spec(DTYPES[code], shape)
        if start < 0 or stop - start != spec.nbytes:
            raise UserError(f"{path}: {name}: {code}{list(shape)} does not fill bytes {start} to {stop}")
        slots[name] = Slot(file, spec, base + start)
    return slots


def read_metadata(path: Path) -> dict[str, str]:
    """Return the strings a safetensors file keeps beside its tensors; the file must have been opened as one."""
    file = File(path)
    (length,) = struct.unpack("<Q", file.read(0, 8))
    return json.loads(file.read(8, length)).get("__metadata__") or {}


def create_safetensors(
    path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None
) -> tuple[File, dict[str, Slot]]:
    """Lay out a safetensors file, its data still zeros."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        header[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = File(path, write=True)
    os.ftruncate(file.fd, 8 + len(text) + offset)
    file.write(struct.pack("<Q", len(text)) + text, 0)
    base = 8 + len(text)
    return file, {n: Slot(file, s, base + header[n]["data_offsets"][0]) for n, s in specs.items()}


@dataclass(frozen=True)
class Safetensors:
    """A folder with ``<stem>.safetensors``, or several files and an index.

    They are written in its ``subfolder``, and read from there or, where there is none, from the folder itself.
    """

    stem: str = "model"
    subfolder: str = ""

    @property
    def patterns(self) -> tuple[str, ...]:
        """The paths of the files, in the folder."""
        names = (f"{self.stem}.safetensors", f"{self.stem}-*-of-*.safetensors", f"{self.stem}.safetensors.index.json")
        return tuple(f"{self.subfolder}/{name}" if self.subfolder else name for name in names)

    def open(self, folder: Path) -> Reader:
        """Read the headers of all files; UserError names a file or key that is missing."""
        if (folder / self.subfolder).is_dir():
            folder = folder / self.subfolder
        index = folder / f"{self.stem}.safetensors.index.json"
        single = folder / f"{self.stem}.safetensors"
        if not index.is_file() or single.is_file():
            if not single.is_file():
                other = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt"))
                hint = f"; {other[0]} is not supported, save the model again as safetensors" if other else ""
                raise UserError(f"{folder}: holds neither {single.name} nor {index.name}{hint}")
            return Reader({name: ([slot], 0) for name, slot in open_safetensors(single).items()})
        weights = read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise UserError(f"{index}: weight_map: missing or empty; it must map each key to its file")
        slots: dict[str, tuple[list[Slot], int]] = {}
        for file in sorted(set(map(str, weights.values()))):
            if Path(file).name != file:
                raise UserError(f"{index}: weight_map: {file!r} is not a file name in the same folder")
            if not (folder / file).is_file():
                raise UserError(f"{folder / file}: missing, though {index.name} lists it; download or copy it again")
            for name, slot in open_safetensors(folder / file).items():
                if name in slots:
                    raise UserError(f"{folder / file}: {name}: also stored in {slots[name][0][0].file.path.name}")
                slots[name] = ([slot], 0)
        for name, file in weights.items():
            if name not in slots or slots[name][0][0].file.path.name != file:
                raise UserError(f"{folder / file}: {name}: missing, though {index.name} says it is there")
        return Reader(slots)

    def create(self, folder: Path, specs: Mapping[str, Spec], *, shards: int = 1, shard_bytes: int) -> Writer:
        """Lay out files of at most ``shard_bytes`` each (a larger tensor has a file of its own)."""
        folder = folder / self.subfolder
        folder.mkdir(exist_ok=True)
        groups: list[dict[str, Spec]] = [{}]
        size = 0
        for name, spec in specs.items():
            if groups[-1] and size + spec.nbytes > shard_bytes:
                groups.append({})
                size = 0
            groups[-1][name] = spec
            size += spec.nbytes
        files, slots, where = [], {}, {}
        for i, group in enumerate(groups, 1):
            part = f"-{i:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            file, found = create_safetensors(folder / f"{self.stem}{part}.safetensors", group)
            files.append(file)
            slots.update({name: ([slot], 0) for name, slot in found.items()})
            where.update(dict.fromkeys(found, file.path.name))
        if len(groups) > 1:
            total = sum(spec.nbytes for spec in specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(folder / f"{self.stem}.safetensors.index.json", index)
        return Writer(files, slots)
