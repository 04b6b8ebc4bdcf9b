"""Files that appear whole or not at all, and JSON."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; UserError names the file and what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON and put it on disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_fixed(raw: Mapping[str, Any], fixed: Mapping[str, Any], path: Path, whose: str) -> None:
    """Raise UserError if a configuration has a setting other than the one all of a model's sizes share."""
    for key, value in fixed.items():
        if raw.get(key, value) != value:
            got, want = (text if len(text) <= 48 else f"{text[:45]}..." for text in (repr(raw[key]), repr(value)))
            raise UserError(f"{path}: {key}={got} is not supported, {whose} has {key}={want}")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions that any new file has; the library's own are for its user alone."""
    from safetensors.torch import save_file

    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(stat.S_IMODE(mode))


def publish(draft: Path, path: Path) -> None:
    """Put a complete file on disk under its name, in one move; both are in one folder."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Put a file or a folder's list of names on disk."""
    with suppress(OSError):  # some network file systems cannot sync a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
