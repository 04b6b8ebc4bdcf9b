"""The zip files of ``torch.save``, read and written piece by piece as safetensors are: nothing in them is executed."""

from __future__ import annotations

import errno
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import UserError
from .tensorfile import File, Reader, Slot, Spec, Writer


def read_pth(path: Path) -> dict[str, Any]:
    """Return what a file of ``torch.save`` maps names to; tensors say where they lie and hold no data.

    Nothing is unpickled but tensors and containers; UserError for anything else.
    """
    File(path).close()
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated, or not a zip file of torch.save; download or copy it again")
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, KeyError ...
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a plain file of tensors: {type(error).__name__}: {reason}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, expected a mapping of names to tensors")
    return state


def open_pth(path: Path, key: str | None = None) -> dict[str, Slot]:
    """Return every tensor's byte range in a file of ``torch.save``, whose mapping may be below ``key``."""
    state, file = read_pth(path), File(path)
    if key is not None:
        state = state.get(key)  # type: ignore[assignment]
        if not isinstance(state, dict):
            raise UserError(f"{path}: holds no mapping {key!r} of names to tensors")
    slots = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name}: holds a {type(tensor).__name__}, expected a tensor")
        if not tensor.is_contiguous():
            raise UserError(f"{path}: {name}: stored as a strided view; save it with .contiguous()")
        spec = Spec(tensor.dtype, tuple(tensor.shape))
        base = tensor.untyped_storage()._checkpoint_offset
        if base is None:
            raise UserError(f"{path}: {name}: torch {torch.__version__} does not say where it lies; torch >= 2.7 does")
        offset = base + int(tensor.storage_offset()) * tensor.element_size()
        if offset + spec.nbytes > file.size:
            raise UserError(f"{path}: {name}: truncated: ends beyond the file; download or copy it again")
        slots[str(name)] = Slot(file, spec, offset)
    return slots


def create_pth(
    path: Path, specs: Mapping[str, Spec], key: str | None = None, beside: Mapping[str, Any] | None = None
) -> tuple[File, dict[str, Slot]]:
    """Lay out a file of ``torch.save`` that holds a mapping of names to tensors, its data still zeros.

    With ``key`` the mapping is below it, next to the plain values ``beside``.
    """
    with FakeTensorMode():
        state: dict[str, Any] = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    if key is not None:
        state = {**(beside or {}), key: state}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        try:
            torch.save(state, path)
        except RuntimeError as error:  # how torch reports a failed write
            raise OSError(errno.EIO, " ".join(str(error).split())[:120]) from None
    found = open_pth(path, key)
    file = File(path, write=True)
    return file, {name: Slot(file, slot.spec, slot.offset) for name, slot in found.items()}


def _seal_pth(sums: dict[Slot, int]) -> None:
    """Enter the checksums that torch could not know when it laid the files out, so that any unzip accepts them."""
    crcs = {(slot.file, slot.offset): crc for slot, crc in sums.items()}
    for file in {slot.file for slot in sums}:
        with zipfile.ZipFile(file.path) as archive:
            place, entries = archive.start_dir, archive.infolist()
        for entry in entries:
            names, extra, comment = struct.unpack("<HHH", file.read(place + 28, 6))
            local_names, local_extra = struct.unpack("<HH", file.read(entry.header_offset + 26, 4))
            start = entry.header_offset + 30 + local_names + local_extra
            if (crc := crcs.get((file, start))) is not None:
                value = struct.pack("<I", crc)
                file.write(value, place + 16)
                after = start + entry.file_size
                if entry.flag_bits & 8 and file.read(after, 4) == b"PK\x07\x08":
                    file.write(value, after + 4)
                elif not entry.flag_bits & 8:
                    file.write(value, entry.header_offset + 14)
            place += 46 + names + extra + comment


@dataclass(frozen=True)
class Consolidated:
    """A folder with ``consolidated.00.pth`` and on: every file holds its share of each tensor.

    ``cut`` gives the dim along which a named tensor is shared out, None: every file holds all of it.
    """

    cut: Callable[[str], int | None]
    patterns: ClassVar[tuple[str, ...]] = ("consolidated.*.pth",)

    def open(self, folder: Path) -> Reader:
        """Read where the tensors of all files lie; UserError names a file or key that is missing."""
        numbers = {int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"consolidated\.(\d\d)\.pth", p.name))}
        for number in range(max(numbers, default=0)):
            if number not in numbers:
                raise UserError(f"{folder / _consolidated(number)}: missing; download or copy it again")
        if not numbers:
            raise UserError(f"{folder / _consolidated(0)}: no such file")
        parts = [open_pth(folder / _consolidated(number)) for number in sorted(numbers)]
        slots: dict[str, tuple[list[Slot], int]] = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            dim = self.cut(name)
            for number, part in enumerate(parts):
                if name not in part:
                    raise UserError(f"{folder / _consolidated(number)}: {name}: missing, other files have it")
                a, b = list(part[name].spec.shape), list(parts[0][name].spec.shape)
                if dim is not None and len(a) == len(b) and dim < len(a):
                    a[dim] = b[dim] = 0
                if a != b or part[name].spec.dtype != parts[0][name].spec.dtype:
                    raise UserError(
                        f"{folder / _consolidated(number)}: {name}: {part[name].spec.dtype}"
                        f"{list(part[name].spec.shape)} does not go with {_consolidated(0)}'s "
                        f"{parts[0][name].spec.dtype}{list(parts[0][name].spec.shape)}"
                    )
            slots[name] = ([parts[0][name]], 0) if dim is None else ([part[name] for part in parts], dim)
        return Reader(slots)

    def create(self, folder: Path, specs: Mapping[str, Spec], *, shards: int = 1, shard_bytes: int = 0) -> Writer:
        """Lay out ``shards`` files; UserError if a tensor does not divide."""
        shares = {}
        for name, spec in specs.items():
            dim, shape = self.cut(name), list(spec.shape)
            if dim is not None:
                if shape[dim] % shards:
                    raise UserError(f"shards={shards}: {name} has {shape[dim]} along dim {dim}, which does not divide")
                shape[dim] //= shards
            shares[name] = Spec(spec.dtype, tuple(shape))
        made = [create_pth(folder / _consolidated(number), shares) for number in range(shards)]
        slots = {}
        for name in specs:
            dim = self.cut(name)
            slots[name] = ([found[name] for _, found in made], -1 if dim is None else dim)
        return Writer([file for file, _ in made], slots, _seal_pth)


@dataclass(frozen=True)
class TorchFile:
    """A folder with one file of ``torch.save``, a mapping of names to tensors.

    With ``key`` the mapping is below it, next to the plain values ``beside``.
    """

    name: str
    key: str | None = None
    beside: Mapping[str, Any] | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The path of the file, in the folder."""
        return (self.name,)

    def open(self, folder: Path) -> Reader:
        """Read where the tensors lie; UserError if the file is missing or broken."""
        return Reader({name: ([slot], 0) for name, slot in open_pth(folder / self.name, self.key).items()})

    def create(self, folder: Path, specs: Mapping[str, Spec], *, shards: int = 1, shard_bytes: int = 0) -> Writer:
        """Lay out the file."""
        file, slots = create_pth(folder / self.name, specs, self.key, self.beside)
        return Writer([file], {name: ([slot], 0) for name, slot in slots.items()}, _seal_pth)


def _consolidated(number: int) -> str:
    return f"consolidated.{number:02d}.pth"
