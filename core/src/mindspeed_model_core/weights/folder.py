"""Folders of weights that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..files import sync
from .layout import AdapterFormat, Layout, first_stranger


@contextmanager
def new_folder(
    destination: Path, overwrite: bool, layouts: Sequence[Layout | AdapterFormat], source: Path | None = None
) -> Iterator[Path]:
    """Give a temporary folder that becomes ``destination`` if all goes well and is removed if not.

    With ``overwrite`` it may replace a folder in one of the layouts that holds nothing else.
    """
    target = Path(os.path.realpath(destination))
    if source is not None:
        origin = Path(os.path.realpath(source))
        if target == origin or target in origin.parents:
            raise UserError(f"{destination}: is the source {source}, or holds it; choose another destination")
    _vacant(destination, target, overwrite, layouts)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if overwrite and target.exists():
            os.rename(target, aside)
            try:
                os.rename(temporary, target)
            except OSError:
                os.rename(aside, target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            _vacant(destination, target, overwrite, layouts)
            os.rename(temporary, target)
        sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            detail = f" ({error.strerror})" if "needed" in str(error.strerror) else ""
            raise UserError(f"{destination}: no space left on the device{detail}; nothing was kept") from None
        raise UserError(f"{destination}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _vacant(destination: Path, target: Path, overwrite: bool, layouts: Sequence[Layout | AdapterFormat]) -> None:
    """Raise UserError if something is at the destination that may not be replaced."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise UserError(f"{destination}: is a file; the destination must be a folder")
    if any(target.iterdir()):
        if not overwrite:
            raise UserError(f"{destination}: exists; choose another destination, or overwrite it with --overwrite")
        _replaceable(destination, target, layouts)


def _replaceable(destination: Path, target: Path, layouts: Sequence[Layout | AdapterFormat]) -> None:
    """Raise UserError unless a folder is in one of the layouts, readable, and holds nothing that we do not write."""
    kept = "so it is not overwritten; remove it first"
    layout = next((each for each in layouts if each.detect(target)), None)
    if layout is None:
        names = " or ".join(each.name for each in layouts)
        raise UserError(f"{destination}: holds no weights in layout {names}, {kept}")
    try:
        layout.check(target)
    except UserError as error:
        raise UserError(f"{destination}: holds no weights in layout {layout.name} ({error}), {kept}") from None
    if (stranger := first_stranger(target, layout.holds)) is not None:
        raise UserError(f"{destination}: also holds {stranger}, which is no part of layout {layout.name}, {kept}")
