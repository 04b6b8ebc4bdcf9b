"""A package started from the template passes its tests before anything is changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .repository import NOXFILE, PACKAGES, ROOT


def test_a_new_model_passes_its_tests(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    model, site = tmp_path / "models" / "abc1", tmp_path / "site"
    NOXFILE.copy_template("abc1", model)
    left = [p for p in model.rglob("*") if "template" in p.name.lower()]
    left += [p for p in model.rglob("*") if p.is_file() and "template" in p.read_text(encoding="utf-8").lower()]
    assert not left
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([sys.executable, *install, str(site), str(model)], check=True)
    env = {**os.environ, "PYTHONPATH": str(site)}
    # Every layout is the template's own test; two processes are enough to see that the copy is found in them.
    many = "test_layouts or test_resumes or every_axis or compiled or deterministic or uninterrupted"
    few = f"not ({many}) or (one_process and tp2 and not pp2 and not sequence)"
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(model / "tests"), "-m", "not device", "-k", few]
    run = subprocess.run([sys.executable, *tests], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    listed = "from mindspeed_model_core.model import find; print(find('abc1').name)"
    out = subprocess.run([sys.executable, "-c", listed], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "abc1"


@pytest.mark.parametrize("name", ["Abc", "a-b", "1a", "", *PACKAGES])
def test_names_that_cannot_be_packages_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="NAME="):
        NOXFILE.copy_template(name, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists"):
        NOXFILE.copy_template("abc1", tmp_path)
