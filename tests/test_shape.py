"""Every package looks alike, and nothing but its folder has to know it."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .repository import MODELS, NOXFILE, PACKAGES, ROOT, project

FILES = {"pyproject.toml", "README.md", "CHANGELOG.md", "newsfragments", "src", "tests"}
SOURCES = {"__init__.py", "__main__.py", "config.py", "data.py", "generate.py", "model.py", "task.py", "weights.py"}
BESIDE = {"recipes", "py.typed"}
# Where a model has a demonstration, frozen encoders (also tiny ones), data encoded beforehand, or errors to count.
MAY_HAVE = {"demo.py", "encoders.py", "evaluate.py", "prepare.py", "tiny.py", "auxiliary.py"}


def listed(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.name != "__pycache__" and not p.name.startswith(".")}


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_have_the_same_files(name: str) -> None:
    folder = PACKAGES[name]
    assert listed(folder) - {"benchmarks"} == FILES
    assert listed(folder / "src") == {f"mindspeed_model_{name}"}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_same_modules(name: str) -> None:
    here = listed(MODELS[name] / "src" / f"mindspeed_model_{name}")
    assert here - MAY_HAVE == SOURCES | BESIDE
    assert list((MODELS[name] / "tests").glob("test_suite.py")), "no subclass of ModelSuite"


@pytest.mark.parametrize("name", MODELS)
def test_models_are_found_by_their_entry_points(name: str) -> None:
    found = project(MODELS[name])["project"]
    package = f"mindspeed_model_{name}"
    assert found["name"] == f"mindspeed-model-{name}"
    assert found["scripts"] == {f"mindspeed-{name}": f"{package}:cli"}
    assert found["entry-points"]["mindspeed_model"] == {name: f"{package}:MODEL"}


def words(path: Path) -> set[str]:
    """Return the strings without blanks of a Python file, or all words of another."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.split(r"[\s\"',=\[\]()]+", re.sub(r"(?m)#.*$", "", text)))
    constants = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str) and " " not in value}


def test_nothing_outside_a_model_names_it() -> None:
    """Tools find models by globs: a name in their configuration or in core would be a second place to edit."""
    tools = [ROOT / name for name in ("noxfile.py", "pyproject.toml", "conftest.py", "constraints.txt", ".ci/run")]
    for path in [*tools, *(PACKAGES["core"] / "src").rglob("*.py")]:
        named = [n for n in set(MODELS) - {"template"} if {n, f"mindspeed_model_{n}", f"models/{n}"} & words(path)]
        assert not named, f"{path.relative_to(ROOT)} names {named}"


IMPORTED = """
import importlib, sys, threading
before = set(sys.modules)
importlib.import_module(sys.argv[1])
heavy = {"megatron", "transformers", "torch_npu", "accelerate", "matplotlib", "pyarrow", "tokenizers", "tensorboard"}
found = sorted(heavy & {m.partition(".")[0] for m in set(sys.modules) - before})
import torch
print(found, torch.distributed.is_initialized(), torch.cuda.is_initialized(), threading.active_count() == 1)
"""


@pytest.mark.parametrize("name", PACKAGES)
def test_importing_a_package_only_defines_it(name: str) -> None:
    run = [sys.executable, "-c", IMPORTED, f"mindspeed_model_{name}"]
    out = subprocess.run(run, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] False False True", out.stdout
    assert not out.stderr, out.stderr


def test_the_import_rules_cover_every_package() -> None:
    rules = configparser.ConfigParser()
    rules.read_string(NOXFILE.contracts())
    packages = {f"mindspeed_model_{name}" for name in PACKAGES}
    assert set(rules["importlinter"]["root_packages"].split()) == packages
    models = packages - {"mindspeed_model_core"}
    assert set(rules["importlinter:contract:core"]["forbidden_modules"].split()) == models
    assert set(rules["importlinter:contract:models"]["modules"].split()) == models
    for library in ("megatron", "torch_npu"):
        assert set(rules[f"importlinter:contract:{library}"]["source_modules"].split()) == packages


def test_every_test_file_is_collected_and_tracked() -> None:
    """Neither an ignore rule nor a folder that pytest passes over hides a test."""
    folders = [folder / "tests" for folder in NOXFILE.PACKAGES.values()]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *map(str, folders)]
    every = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # CI chooses with it
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=every).stdout
    collected = {line.partition("::")[0] for line in printed.splitlines() if "::" in line}
    there = {str(f.relative_to(ROOT)) for folder in folders for f in folder.rglob("test_*.py")}
    assert collected == there
    if (ROOT / ".git").exists():
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert there <= set(tracked.splitlines())
