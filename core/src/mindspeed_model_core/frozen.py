"""Frozen parts in the folders of diffusers' pipelines: VAEs, text and image encoders, loaded on first use."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import UserError

_SAMPLE = 64 * 2**10


class FrozenParts:
    """A folder with a subfolder for each frozen part, of which a model's own class says what it computes with them.

    ``needed`` are the subfolders that must be there. Nothing is downloaded. Raises UserError for a part that is missing
    or cannot be read.
    """

    needed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = Path(folder).expanduser(), torch.device(device)
        for name in self.needed:
            self.part(name)

    def part(self, name: str) -> Path:
        """Return the folder of a part."""
        folder = self.folder / name
        if not folder.is_dir():
            wanted = ", ".join(f"{part}/" for part in dict.fromkeys((*self.needed, name)))
            raise UserError(f"encoders={self.folder}: no {name}/ there; a folder in diffusers' layout holds {wanted}")
        return folder

    def load(self, name: str, kind: Any, **dtype: torch.dtype) -> Any:
        """Return a part as a network of diffusers' or transformers' class ``kind``, on the device, frozen."""
        from transformers.utils import logging

        folder = self.part(name)
        logging.disable_progress_bar()  # one for each model of each process
        try:
            network = kind.from_pretrained(str(folder), local_files_only=True, **dtype)
        except Exception as error:  # what from_pretrained raises has no common kind
            raise UserError(f"{folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None
        return network.to(self.device).requires_grad_(False).eval()


def has_parts(folder: str | Path, names: Sequence[str]) -> bool:
    """Return whether a folder holds all of these parts."""
    return all((Path(folder).expanduser() / name).is_dir() for name in names)


def fingerprint(folder: str | Path, names: Sequence[str]) -> str:
    """Return 12 hex digits of the files of these parts: their names, sizes, and first and last 64 KiB."""
    digest = hashlib.sha256()
    folder = Path(folder).expanduser()
    for name in names:
        for path in sorted(p for p in (folder / name).rglob("*") if p.is_file() and not p.name.startswith(".")):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)}/{size}/".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE))
                file.seek(max(0, size - _SAMPLE))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:12]


def pad_rows(rows: Sequence[Tensor], length: int) -> Tensor:
    """Return ``[B, length, width]`` of embeddings ``[tokens, width]``, zero beyond each one's tokens."""
    out = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row[:length]
    return out


def signed(pixels: Tensor, device: torch.device) -> Tensor:
    """Return uint8 pixels as fp32 in [-1, 1], what VAEs see, on the device."""
    return pixels.to(device, torch.float32) / 127.5 - 1


def unsigned(pixels: Tensor) -> Tensor:
    """Return pixels in [-1, 1] as uint8, those beyond at the ends."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
