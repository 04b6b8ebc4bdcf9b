"""What packages say of themselves agrees with each other, and holds outside this checkout."""

from __future__ import annotations

import os
import re
from email.parser import Parser
from pathlib import Path
from typing import Any

import nox
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .repository import MODELS, PACKAGES, ROOT, project

MARK = "<!-- towncrier release notes start -->"


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.fixture
def metadata(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """Return the metadata a package's wheel will have, as its build backend writes it."""
    from poetry.core.masonry import api

    before = Path.cwd()
    os.chdir(PACKAGES[request.param])
    try:
        written = api.prepare_metadata_for_build_wheel(str(tmp_path))
    finally:
        os.chdir(before)
    return Parser().parsestr((tmp_path / written / "METADATA").read_text(encoding="utf-8"))


@pytest.mark.parametrize("metadata", PACKAGES, indirect=True)
def test_wheels_need_no_local_path(metadata: Any) -> None:
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert needs and not [n for n in needs if n.url], needs
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10,<3.13"


@pytest.mark.parametrize("name", MODELS)
def test_models_accept_the_core_beside_them(name: str) -> None:
    core = Version(project(PACKAGES["core"])["project"]["version"])
    needs = [Requirement(text) for text in project(MODELS[name])["project"]["dependencies"]]
    ranges = [n.specifier for n in needs if n.name == "mindspeed-model-core"]
    assert len(ranges) == 1 and core in ranges[0] and any(s.operator == "<" for s in ranges[0])


@pytest.mark.parametrize("name", PACKAGES)
def test_changelogs_end_at_the_version(name: str) -> None:
    folder = PACKAGES[name]
    text = (folder / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.count(MARK) == 1
    released = re.findall(r"(?m)^## (\S+) \(", text)
    version = project(folder)["project"]["version"]
    assert released[:1] in ([], [version]), f"pyproject.toml says {version}, CHANGELOG.md {released[:1]}"
    kinds = {t["directory"] for t in project(ROOT)["tool"]["towncrier"]["type"]}
    for fragment in (folder / "newsfragments").glob("[!.]*"):
        assert re.fullmatch(rf"(\+?[\w-]+)\.({'|'.join(kinds)})(\.\d+)?\.md", fragment.name), fragment


@pytest.mark.parametrize("name", PACKAGES)
def test_the_tested_set_is_in_the_declared_ranges(name: str) -> None:
    declared = project(PACKAGES[name])["project"]
    extras = declared.get("optional-dependencies", {}).values()
    needs = [Requirement(t) for t in [*declared["dependencies"], *(t for extra in extras for t in extra)]]
    pins = constraints()
    for need in needs:
        for pin in (p for p in pins if p.name.lower() == need.name.lower()):
            version = next(iter(pin.specifier)).version
            assert version in need.specifier, f"{pin} is outside {need}"
    # What decides numbers must be pinned; setuptools and torch_npu follow torch, core is beside.
    loose = {n.name for n in needs} - {p.name for p in pins} - {"mindspeed-model-core", "setuptools", "torch_npu"}
    assert not loose, f"not in constraints.txt: {sorted(loose)}"


def test_every_python_has_one_pin_of_each() -> None:
    for python in ("3.10", "3.11", "3.12"):
        env = {"python_version": python}
        names = [p.name for p in constraints() if p.marker is None or p.marker.evaluate(env)]
        assert sorted(set(names)) == sorted(names) and set(names) == {p.name for p in constraints()}, python


def test_tools_have_one_version() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pins = {p.name: str(p.specifier).removeprefix("==") for p in constraints()}
    found = re.findall(r'"([\w-]+)==([\w.]+)"', text)
    assert found
    for tool, version in found:
        assert pins[tool] == version, f".pre-commit-config.yaml has {tool} {version}, constraints.txt {pins[tool]}"
    groups = nox.project.load_toml(ROOT / "pyproject.toml")["dependency-groups"]
    for tool in (Requirement(t) for group in groups.values() for t in group):
        assert pins[tool.name] in tool.specifier


def test_nox_takes_the_pythons_of_the_packages() -> None:
    from .repository import NOXFILE

    low, high = (".".join(map(str, v)) for v in NOXFILE.PYTHONS)
    for folder in PACKAGES.values():
        assert SpecifierSet(project(folder)["project"]["requires-python"]) == SpecifierSet(f">={low},<{high}")


def test_cores_wheel_holds_the_emulators_sources(tmp_path: Path) -> None:
    """Sources in C are no modules, so nothing else would miss them."""
    import zipfile

    from poetry.core.masonry import api

    before = Path.cwd()
    os.chdir(PACKAGES["core"])
    try:
        built = api.build_wheel(str(tmp_path))
    finally:
        os.chdir(before)
    held = {Path(name).name for name in zipfile.ZipFile(tmp_path / built).namelist() if "/npu_emulator/" in name}
    folder = PACKAGES["core"] / "src" / "mindspeed_model_core" / "testing" / "npu_emulator"
    there = {p.name for p in folder.rglob("*") if p.suffix in (".c", ".h", ".py")}
    assert {"runtime.c", "hccl.c", "opapi.c", "emulator.h"} <= there <= held
