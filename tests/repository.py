"""Where things are in this repository, for its own tests."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nox

ROOT = Path(__file__).resolve().parents[1]


def load_noxfile() -> ModuleType:
    """Return noxfile.py as a module; loading it twice would register its sessions twice."""
    if "noxfile" not in sys.modules:
        spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["noxfile"] = module
        spec.loader.exec_module(module)
    return sys.modules["noxfile"]


NOXFILE = load_noxfile()
PACKAGES: dict[str, Path] = NOXFILE.PACKAGES
MODELS: dict[str, Path] = {name: folder for name, folder in PACKAGES.items() if name != "core"}
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "core/*.md", "models/*/*.md", "perf_baselines/*.md")
    for path in ROOT.glob(pattern)
)


def project(folder: Path) -> dict[str, Any]:
    """Return a package's pyproject.toml."""
    return nox.project.load_toml(folder / "pyproject.toml")


def blocks(path: Path) -> list[tuple[int, bool, str]]:
    """Return the bash blocks of a document: line, whether ``<!-- run -->`` stands above it, text."""
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"(<!-- run -->\n+)?^```(?:bash|sh|shell)\n(.*?)^```", text, re.S | re.M)
    return [(text[: m.start(2)].count("\n") + 1, bool(m[1]), m[2]) for m in found]


def commands(text: str) -> list[str]:
    """Return the commands of a bash block: comments dropped, continued lines joined, joined commands parted."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = (line.split(" #")[0].strip() for line in joined.splitlines() if not line.lstrip().startswith("#"))
    return [part.strip() for line in lines for part in re.split(r"&&|\|\||;", line) if part.strip()]
