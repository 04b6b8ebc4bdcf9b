"""Where a number comes from: the versions of what it stands on, and the commit."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

CORE = "mindspeed-model-core"
_PACKAGE = "mindspeed_model_core"


def stack() -> str:
    """Return the versions a speed depends on, such as ``torch 2.8.0, cuda 12.8, megatron-core 0.16.1, python 3.11``."""
    found = [f"torch {torch.__version__}"]
    if torch.version.cuda:
        found.append(f"cuda {torch.version.cuda}")
    for name in ("torch-npu", "megatron-core", "flash-attn-4"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    cann = _cann()
    if cann:
        found.append(f"cann {cann}")
    found.append(f"python {platform.python_version()}")
    return ", ".join(found)


def _cann() -> str | None:
    home = os.environ.get("ASCEND_TOOLKIT_HOME") or os.environ.get("ASCEND_HOME_PATH")
    if not home:
        return None
    for info in sorted(Path(home).glob("**/ascend_toolkit_install.info")):
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("version="):
                return line.partition("=")[2].strip()
    return None


def commit(*packages: str, files: Sequence[Path] = ()) -> str | None:
    """Return what code runs: the git commit its sources stand at, else the installed distributions' versions.

    ``packages`` are import names; core is always one of them; ``files`` are sources beside them, in a checkout. A
    commit whose sources hold changes, new files included, ends in ``+dirty``. None when it cannot be told, for
    instance in a repository without a commit.
    """
    found: list[str] = []
    names = dict.fromkeys((*packages, _PACKAGE))
    for each in [*map(_version, names), *map(_standing, files)]:
        if each is None:
            return None
        if each not in found:
            found.append(each)
    # One repository, one of whose packages is changed: the changed one says it all.
    return " ".join(v for v in found if f"{v}+dirty" not in found)


def _version(package: str) -> str | None:
    file = importlib.import_module(package).__file__
    if file is None:
        return None
    folder = Path(file).resolve().parent
    if any((parent / ".git").exists() for parent in folder.parents):
        ignored = _git(folder, "check-ignore", "-q", str(folder))
        if ignored is None:
            return None
        # An environment inside a checkout is ignored by it: the checkout's commit is not the installed code's.
        if ignored.returncode != 0:
            return _standing(folder)
    for name in metadata.packages_distributions().get(package, ()):
        return f"{name}=={metadata.version(name)}"
    return None


def _standing(path: Path) -> str | None:
    """Return the commit that a file or folder stands at, with ``+dirty`` where it is changed."""
    folder = path if path.is_dir() else path.parent
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    status = _git(folder, "status", "--porcelain", "--", str(path))
    if head is None or status is None or head.returncode or status.returncode:
        return None
    return head.stdout.strip() + ("+dirty" if status.stdout.strip() else "")


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
