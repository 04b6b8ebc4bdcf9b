from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mindspeed_model_core import breakdown, peak, perf
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.peak import Peak
from mindspeed_model_core.perf import measurement, provenance
from mindspeed_model_core.recipe import Recipe


class FakeMesh:
    device, world = torch.device("cpu"), 2

    def __init__(self, slower: float = 1.0) -> None:
        self.slower = slower
        self.barriers = 0

    def barrier(self) -> None:
        self.barriers += 1

    def gather(self, value: list[float]) -> list[list[float]]:
        return [value, [v * self.slower for v in value]]


class FakeSession:
    """Steps whose totals may be read only once the device was waited for."""

    def __init__(self, mesh: FakeMesh) -> None:
        self.mesh, self.task = mesh, SimpleNamespace(unit="tokens")
        self.optimizer = SimpleNamespace(moved=8000)
        self.done = 0

    def step(self, mark: Any = None) -> Any:
        self.done += 1
        return SimpleNamespace(read=lambda: [2.5, 8.0, 8000.0, 4e12, 0.0, 8000.0, 1.0])


@pytest.fixture
def ticks(monkeypatch) -> Iterator[list[float]]:
    """Durations the clock shows between marks."""
    durations: list[float] = []
    now = [100.0]

    def clock() -> float:
        now[0] += durations.pop(0) if durations else 0
        return now[0]

    monkeypatch.setattr(breakdown, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(measurement, "measured_peak", lambda device, precision: Peak(1e14, "measured matmul"))
    monkeypatch.setattr(measurement, "copy_rate", lambda device: 1e12)
    yield durations


MODEL: Any = SimpleNamespace(name="demo", package="mindspeed_model_core")


def test_the_median_step_decides(ticks):
    ticks[:] = [0, 2, 1, 2, 9, 2]  # the window's begin, then five steps
    mesh = FakeMesh()
    session = FakeSession(mesh)
    recipe = Recipe(name="tiny", preset="tiny", precision="bf16")
    m = perf.measure(recipe, MODEL, steps=5, warmup=3, session=session)
    # 3 more are marked, behind the timed ones, and one is recorded.
    assert session.done == 3 + 5 + 3 + 1 and mesh.barriers == 2
    assert m.step_s == 2 and m.quartiles == (2, 2) and m.spread == 0
    assert m.samples_per_s == 4 and m.value() == 2000 and m.unit == "tokens/s/device"
    assert m.flops == 1e12 and m.mfu == 0.01 and m.value("% MFU") == pytest.approx(1)
    assert m.value("samples/s") == 4 and m.value("frames/s") is None
    assert (m.digest, m.devices, m.steps, m.warmup) == (recipe.digest(), 2, 5, 3)
    assert m.hardware and m.peak_bytes > 0 and f"torch {torch.__version__}" in m.stack


def test_a_step_takes_as_long_as_on_the_slowest_rank(ticks):
    ticks[:] = [0, 1, 1, 3]
    m = perf.measure(Recipe(preset="tiny"), MODEL, steps=3, warmup=0, session=FakeSession(FakeMesh(slower=2.0)))
    assert m.step_s == 2 and m.quartiles == (2, 4) and m.spread == 1


def test_frames_and_samples_are_global(ticks):
    for unit, expected in (("frames", ("frames/s", 4000.0)), ("samples", ("samples/s", 4.0))):
        ticks[:] = [0, 2]
        session = FakeSession(FakeMesh())
        session.task = SimpleNamespace(unit=unit)
        m = perf.measure(Recipe(preset="tiny"), MODEL, steps=1, warmup=0, session=session)
        assert (m.unit, m.value()) == expected


def test_steps_must_be_positive():
    with pytest.raises(UserError, match="steps=0, warmup=3"):
        perf.measure(Recipe(preset="tiny"), MODEL, steps=0)


@pytest.mark.parametrize(
    ("name", "precision", "flops"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16-pure", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("Ascend910B2", "bf16", 376e12),
    ],
)
def test_known_peaks(name, precision, flops):
    found = peak.known_peak(name, precision)
    assert found is not None and found.flops == flops


def test_unknown_peaks_are_none():
    assert peak.known_peak("AMD EPYC x2", "bf16") is None
    assert peak.known_peak("NVIDIA H200", "fp64") is None


def test_a_measured_peak_is_a_plausible_speed():
    found = peak.measured_peak(torch.device("cpu"), "fp32", repeats=1)
    assert found.source == "measured matmul" and 1e8 < found.flops < 1e14


def test_copies_have_a_plausible_speed():
    assert 1e8 < peak.copy_rate(torch.device("cpu"), repeats=1) < 1e14


def test_the_clock_measures_the_host():
    clock = breakdown.Clock(torch.device("cpu"))
    for _ in range(3):
        clock.mark()
        time.sleep(0.01)
    assert len(clock.seconds()) == 2 and all(0.009 < s < 1 for s in clock.seconds())


def git(folder, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A package under git, imported from its checkout."""
    package = tmp_path / "repo" / "zoo_probe"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(package.parent, "init", "-q")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield package
    sys.modules.pop("zoo_probe", None)


def test_the_commit_is_that_of_the_sources(checkout, tmp_path):
    assert provenance._version("zoo_probe") is None  # nothing is committed
    git(checkout.parent, "add", ".")
    git(checkout.parent, "commit", "-qm", "one")
    head = git(checkout.parent, "rev-parse", "--short=12", "HEAD")
    assert provenance._version("zoo_probe") == head
    (checkout.parent / "notes.csv").write_text("not a source")
    assert provenance._version("zoo_probe") == head
    (checkout / "new.py").write_text("")
    assert provenance._version("zoo_probe") == f"{head}+dirty"


def test_a_package_the_repository_ignores_has_its_own_version(checkout, monkeypatch):
    (checkout.parent / ".gitignore").write_text("zoo_probe/\n")
    git(checkout.parent, "add", ".gitignore")
    git(checkout.parent, "commit", "-qm", "one")
    assert provenance._version("zoo_probe") is None
    monkeypatch.setattr(provenance.metadata, "packages_distributions", lambda: {"zoo_probe": ["zoo-probe"]})
    monkeypatch.setattr(provenance.metadata, "version", lambda name: "1.2")
    assert provenance._version("zoo_probe") == "zoo-probe==1.2"


def test_one_repository_is_one_commit(monkeypatch):
    versions = {"a": "abc+dirty", "mindspeed_model_core": "abc"}
    monkeypatch.setattr(provenance, "_version", versions.get)
    assert perf.commit("a") == "abc+dirty"
    versions["a"] = "abc"
    assert perf.commit("a") == "abc"
    versions["a"] = "a==1.0"
    assert perf.commit("a") == "a==1.0 abc"
    del versions["a"]
    assert perf.commit("a") is None


def test_the_stack_names_cann(tmp_path, monkeypatch):
    info = tmp_path / "aarch64-linux" / "ascend_toolkit_install.info"
    info.parent.mkdir()
    info.write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\n")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    assert "cann 8.5.0" in perf.stack()


@pytest.mark.parametrize("fails", [False, True])
def test_the_group_is_left_only_after_success(ticks, monkeypatch, fails):
    """After an error the other ranks may be anywhere: leaving would wait for them."""
    ticks[:] = [0, 1]
    closed: list[Any] = []
    mesh, session = FakeMesh(), FakeSession(FakeMesh())
    opened = SimpleNamespace(
        mesh=mesh, task=session.task, optimizer=session.optimizer, start=lambda: None, step=session.step
    )
    if fails:
        monkeypatch.setattr(opened, "start", lambda: 1 / 0)
    monkeypatch.setattr("mindspeed_model_core.parallel.mesh.open_mesh", lambda parallel, buffers: mesh)
    monkeypatch.setattr("mindspeed_model_core.parallel.mesh.close_mesh", closed.append)
    monkeypatch.setattr("mindspeed_model_core.train.Session", lambda *args, **kwargs: opened)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        perf.measure(Recipe(preset="tiny"), MODEL, steps=1, warmup=0)
    assert closed == ([] if fails else [mesh])
