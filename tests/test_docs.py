"""The documentation's commands run, its other commands exist, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .repository import DOCUMENTS, NOXFILE, ROOT, blocks, commands

pytestmark = pytest.mark.docs
BIN = Path(sys.executable).parent
# The same block in two documents, such as the README's in another language, is run once.
MARKED = [(path, line, text) for path in reversed(DOCUMENTS) for line, run, text in blocks(path) if run]
RUN = list({text: (path, line, text) for path, line, text in MARKED}.values())


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(("path", "line", "text"), RUN, ids=[f"{where(p)}:{n}" for p, n, _ in RUN])
def test_marked_blocks_run(path: Path, line: int, text: str, tmp_path: Path) -> None:
    """Blocks below ``<!-- run -->`` run in an empty folder with the packages installed; the first failure ends one."""
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "160"}
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, f"{where(path)}:{line}\n{text}\n{run.stdout[-2000:]}{run.stderr[-2000:]}"


def test_something_is_run() -> None:
    assert {where(path) for path, _, _ in RUN} >= {"README.md"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=where)
def test_links_lead_to_files(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        aim = (path.parent / file) if file else path
        assert aim.exists(), f"{where(path)}: {target} leads nowhere"
        if anchor:
            heads = re.findall(r"(?m)^#+ (.+)$", aim.read_text(encoding="utf-8"))
            known = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads]
            assert anchor in known, f"{where(path)}: {target} has no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=where)
def test_commands_exist(path: Path) -> None:
    """``nox -s X`` names a session, ``mindspeed... X`` a command, and a recipe that it names is shipped."""
    from mindspeed_model_core import recipe
    from mindspeed_model_core.cli import app, common_app
    from mindspeed_model_core.model import find
    from typer.main import get_command

    for line, _, text in blocks(path):
        for command in commands(text):
            words = [w.strip("\"'") for w in re.findall(r"\"[^\"]*\"|'[^']*'|\S+", command)]
            at = f"{where(path)}:{line}: {command}"
            if words[0] == "nox" and "-s" in words:
                name, _, cell = words[words.index("-s") + 1].partition("(")
                assert hasattr(NOXFILE, name), at
                if cell:
                    assert cell.rstrip(")") in {*NOXFILE.PACKAGES, "repository", "NAME"}, at
            if re.fullmatch(r"mindspeed(-\w+)?", words[0]) and len(words) > 1 and not words[1].startswith("-"):
                model = find(words[0].partition("-")[2]) if "-" in words[0] else None
                known = get_command(app(model) if model else common_app())
                assert words[1] in known.commands, at  # type: ignore[attr-defined]
                if model and words[1] in ("show", "train", "measure") and not words[2].endswith(".yaml"):
                    assert words[2] in recipe.names(model.package), at


def test_both_readmes_show_the_same_commands() -> None:
    english, chinese = (
        [c for _, _, t in blocks(ROOT / f) for c in commands(t)] for f in ("README.md", "README.zh-CN.md")
    )
    assert english == chinese
