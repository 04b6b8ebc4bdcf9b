from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import device as devices
from mindspeed_model_core.profile import Profiler
from mindspeed_model_core.recipe import ProfileConfig

CPU = torch.device("cpu")


def run(profiler: Profiler, steps: range) -> None:
    for step in steps:
        with profiler.step(step):
            torch.ones(8, 8) @ torch.ones(8, 8)


def traces(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("profile/*.pt.trace.json*"))
    return [json.loads(gzip.open(f).read() if f.suffix == ".gz" else f.read_bytes()) for f in files]


def steps_in(trace: dict[str, Any]) -> list[int]:
    names = {e["name"] for e in trace["traceEvents"] if str(e.get("name", "")).startswith("ProfilerStep#")}
    return sorted(int(n.partition("#")[2]) for n in names)


def test_a_window_is_the_steps_it_names(tmp_path):
    profiler = Profiler(ProfileConfig(start=3, stop=4), tmp_path, 0, CPU)
    run(profiler, range(1, 7))
    (trace,) = traces(tmp_path)
    assert steps_in(trace) == [3, 4]
    assert any("aten::mm" in str(e.get("name")) for e in trace["traceEvents"])
    assert next((tmp_path / "profile").iterdir()).name.startswith("rank0.")


def test_start_alone_is_one_step(tmp_path):
    run(Profiler(ProfileConfig(start=2), tmp_path, 0, CPU), range(1, 5))
    assert [steps_in(t) for t in traces(tmp_path)] == [[2]]


def test_touching_the_file_profiles_a_few_steps_and_says_where(tmp_path, capsys):
    profiler = Profiler(ProfileConfig(), tmp_path, 0, CPU)
    run(profiler, range(1, 3))
    (tmp_path / "profile.on").touch()
    run(profiler, range(3, 20))
    assert [steps_in(t) for t in traces(tmp_path)] == [[3, 4, 5, 6, 7]]
    assert capsys.readouterr().out == f"profile of steps 3 to 7 on rank 0 written to {tmp_path / 'profile'}\n"
    assert not (tmp_path / "profile.on").exists()
    (tmp_path / "profile.on").write_text("2\n")
    run(profiler, range(20, 30))
    assert sorted(steps_in(t) for t in traces(tmp_path)) == [[3, 4, 5, 6, 7], [20, 21]]


def test_every_named_rank_sees_the_file_before_it_goes(tmp_path):
    first, second = (Profiler(ProfileConfig(ranks=(0, 1)), tmp_path, rank, CPU) for rank in (0, 1))
    (tmp_path / "profile.on").write_text("1")
    run(first, range(1, 2))
    run(second, range(1, 2))
    run(second, range(2, 4))
    run(first, range(2, 4))
    assert sorted(steps_in(t) for t in traces(tmp_path)) == [[1], [1]]
    assert not (tmp_path / "profile.on").exists()


def test_off_is_the_same_empty_context_and_makes_no_profiler(tmp_path, monkeypatch):
    def never(device: torch.device) -> Any:
        raise AssertionError("a profiler was made")

    monkeypatch.setattr(devices, "profiler", never)
    off = Profiler(ProfileConfig(), tmp_path, 0, CPU)
    assert off.step(1) is off.step(2)
    other = Profiler(ProfileConfig(start=1, ranks=(0,)), tmp_path, 1, CPU)
    (tmp_path / "profile.on").touch()
    assert other.step(1) is other.step(2)
    assert not (tmp_path / "profile").exists()


def test_the_run_ending_inside_a_window_writes_it(tmp_path):
    with Profiler(ProfileConfig(start=2, stop=100), tmp_path, 0, CPU) as profiler:
        run(profiler, range(1, 5))
        assert traces(tmp_path) == []
    profiler.close()
    assert [steps_in(t) for t in traces(tmp_path)] == [[2, 3, 4]]


def test_a_failing_step_leaves_its_trace(tmp_path):
    profiler = Profiler(ProfileConfig(start=1, stop=3), tmp_path, 0, CPU)
    with pytest.raises(RuntimeError, match="boom"), profiler.step(1):
        raise RuntimeError("boom")
    assert [steps_in(t) for t in traces(tmp_path)] == [[1]]


def test_shapes_are_recorded_when_asked(tmp_path):
    run(Profiler(ProfileConfig(start=1, shapes=True), tmp_path, 0, CPU), range(1, 2))
    (trace,) = traces(tmp_path)
    assert any(e.get("args", {}).get("Input Dims") for e in trace["traceEvents"] if e.get("name") == "aten::mm")


def test_another_device_brings_its_profiler_and_snapshot(tmp_path, monkeypatch):
    """What an NPU's module must offer, with a stand-in: the activity of the device's name, and the same calls."""
    calls: list[Any] = []

    class Activity:
        CPU, NPU = "cpu", "npu"

    class Module:
        ProfilerActivity = Activity

        @staticmethod
        def tensorboard_trace_handler(folder: str, worker_name: str) -> str:
            return f"{Path(folder).name}/{worker_name}"

        class profile:
            def __init__(self, **options: Any) -> None:
                calls.append(options)

            def start(self) -> None:
                calls.append("start")

            def stop(self) -> None:
                calls.append("stop")

    monkeypatch.setattr(devices, "profiler", lambda device: Module)
    monkeypatch.setattr(devices, "record_memory", lambda device: calls.append("history") is None)
    monkeypatch.setattr(devices, "memory_snapshot", lambda device, path: calls.append(path.name) is None)

    class Npu:
        type = "npu"

    profiler = Profiler(ProfileConfig(start=2, memory=True, stacks=True), tmp_path, 0, Npu())  # type: ignore[arg-type]
    run(profiler, range(1, 4))
    options = calls.pop(0)
    assert options["activities"] == ["cpu", "npu"] and options["on_trace_ready"] == "profile/rank0"
    assert options["with_stack"] and options["profile_memory"] and not options["record_shapes"]
    assert calls == ["history", "start", "stop", "rank0-step2.memory.pickle"]
