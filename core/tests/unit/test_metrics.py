from __future__ import annotations

import io
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import metrics, peak
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.metrics import Recorder, StepRecord, read
from mindspeed_model_core.recipe import MetricsConfig, Recipe
from mindspeed_model_core.task import Work


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def recipe(steps: int = 10, every: int = 1, trackers: tuple[str, ...] | None = ()) -> Recipe:
    return Recipe(name="demo", preset="tiny", steps=steps, metrics=MetricsConfig(every=every, trackers=trackers))


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = dict(
        step=step, loss=10.0 / step, grad_norm=1.5, lr=1e-4, work=Work(8, 4096, 2e12), seconds=0.5, memory=2**30
    )
    return StepRecord(**{**values, **changes})


def write(folder: Path, steps: range, *, total: int = 10, every: int = 1, **kwargs: Any) -> str:
    stream = kwargs.pop("stream", None) or io.StringIO()
    with Recorder(folder, recipe(total, every), rank=0, stream=stream, unit="tokens", **kwargs) as recorder:
        for step in steps:
            recorder.step(record(step))
    return stream.getvalue()


def test_rates_are_over_all_devices_and_per_device(tmp_path, monkeypatch):
    monkeypatch.setattr(peak, "known_peak", lambda name, precision: peak.Peak(4e12, "data sheet"))
    write(tmp_path, range(1, 2), device=torch.device("cpu"), devices_used=4)
    (only,) = read(tmp_path)
    assert only["samples_per_s"] == 16
    assert only["units_per_s"] == 8192
    assert only["units_per_s_per_device"] == 2048
    assert only["tflops_per_device"] == 1  # 2e12 FLOPs / 0.5 s / 4 devices
    assert only["mfu"] == 0.25
    assert only["unit"] == "tokens" and only["memory_bytes"] == 2**30


def test_mfu_is_null_without_a_known_peak(tmp_path):
    write(tmp_path, range(1, 2), device=torch.device("cpu"))
    assert read(tmp_path)[0]["mfu"] is None


def test_every_n_steps_covers_the_steps_between(tmp_path):
    write(tmp_path, range(1, 11), every=4)
    records = read(tmp_path)
    assert [r["step"] for r in records] == [1, 4, 8, 10]
    assert [r["samples"] for r in records] == [8, 24, 32, 16]
    assert [r["samples_per_s"] for r in records] == [16] * 4


def test_close_writes_what_is_pending(tmp_path):
    write(tmp_path, range(1, 4), every=100)
    assert [r["step"] for r in read(tmp_path)] == [1, 3]


def test_other_ranks_write_nothing(tmp_path):
    with Recorder(tmp_path / "run", recipe(), rank=1, stream=io.StringIO()) as recorder:
        recorder.step(record(1))
    assert not (tmp_path / "run").exists()


def test_a_fresh_run_refuses_a_folder_with_records(tmp_path):
    write(tmp_path, range(1, 3))
    with pytest.raises(UserError, match=r"metrics\.jsonl: a run is recorded here already"):
        write(tmp_path, range(1, 3))


def test_resume_drops_later_records_and_a_torn_line(tmp_path):
    write(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:3]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "loss": 1.')
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 3, 4, 5]
    write(tmp_path, range(4, 7), resume_step=3)
    assert [r["step"] for r in read(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:3] == before
    assert not list(tmp_path.glob(".metrics*"))


def test_resume_at_zero_starts_over(tmp_path):
    write(tmp_path, range(1, 3))
    write(tmp_path, range(1, 2), resume_step=0)
    assert [r["step"] for r in read(tmp_path)] == [1]


def test_a_broken_line_elsewhere_is_named(tmp_path):
    write(tmp_path, range(1, 4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[1] = '{"step": 2, "lo'
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a step record"):
        read(tmp_path)


def test_what_is_not_finite_is_valid_json(tmp_path):
    with Recorder(tmp_path, recipe(), rank=0, stream=io.StringIO()) as recorder:
        recorder.step(record(1, loss=math.nan, grad_norm=math.inf))
        recorder.step(record(2))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=refuse)
    assert first["loss"] is None and first["grad_norm"] is None
    assert (tmp_path / "loss.png").exists()


def test_plain_lines_have_no_control_characters(tmp_path):
    text = write(tmp_path, range(1, 4))
    assert all(c.isprintable() or c == "\n" for c in text) and text.isascii()
    assert text.splitlines()[1] == (
        "step  2/10  loss 5.0000  grad 1.5  lr 1.00e-04  8.19k tokens/s  4 TFLOP/s per device  1.0 GiB  0.5 s/step"
    )


def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    text = write(tmp_path, range(1, 11), stream=Terminal())
    assert "\x1b[" in text and "10/10" in text and "loss 1.0000" in text


def test_tensorboard_is_the_default_and_a_resume_purges(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(steps: range, resume_step: int | None = None) -> None:
        with Recorder(
            tmp_path, recipe(10, trackers=None), rank=0, stream=io.StringIO(), resume_step=resume_step
        ) as recorder:
            for step in steps:
                recorder.step(record(step))

    run(range(1, 6))
    run(range(4, 7), resume_step=3)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "demo"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("speed/samples_per_s")[0].value == 16
    assert any("recipe" in tag for tag in events.Tags()["tensors"])


def test_an_unknown_tracker_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="'tensorbord': no such tracker; did you mean 'tensorboard'"):
        Recorder(tmp_path, recipe(trackers=("tensorbord",)), rank=0, stream=io.StringIO())


def test_a_tracker_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(UserError, match="'wandb': its package is not installed; pip install wandb"):
        Recorder(tmp_path, recipe(trackers=("wandb",)), rank=0, stream=io.StringIO())


def test_a_registered_tracker_gets_recipe_and_values(tmp_path, monkeypatch):
    import accelerate.tracking
    from accelerate.tracking import GeneralTracker

    calls: list[Any] = []

    class Mine(GeneralTracker):
        name, requires_logging_directory, tracker = "mine", False, None

        def __init__(self, run_name: str) -> None:
            super().__init__()
            calls.append(run_name)

        def store_init_configuration(self, values: dict) -> None:
            calls.append(values["optim.lr"])

        def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
            calls.append((step, values["train/loss"]))

        def finish(self) -> None:
            calls.append("finish")

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "mine", Mine)
    with Recorder(tmp_path, recipe(trackers=("mine",)), rank=0, stream=io.StringIO()) as recorder:
        recorder.step(record(2))
    assert calls == ["demo", 3e-4, (2, 5.0), "finish"]


def test_the_chart_is_a_png_of_many_steps(tmp_path):
    lines = []
    for step in range(1, 5001):
        values = metrics._values([record(step)], "tokens", 1, 8e12)
        lines.append(json.dumps(values))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    path = metrics.plot(tmp_path)
    assert path == tmp_path / "loss.png"
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (1080, 720)


def test_nothing_recorded_no_chart(tmp_path):
    with Recorder(tmp_path, recipe(), rank=0, stream=io.StringIO()):
        pass
    assert not (tmp_path / "loss.png").exists()
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "elsewhere")


def test_smoothing_keeps_the_ends():
    values = [float(i) for i in range(100)]
    assert metrics._smooth(values) == pytest.approx(values)


def test_nothing_is_written_before_the_first_record(tmp_path):
    recorder = Recorder(tmp_path / "run", recipe(), rank=0, stream=io.StringIO())
    assert not (tmp_path / "run").exists()
    recorder.step(record(1))
    recorder.close()
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_full_disk_is_named_and_leaves_no_half_line(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path, recipe(), rank=0, stream=io.StringIO())
    recorder.step(record(1))

    class Full(metrics.FileIO):
        def write(self, line):
            if line.startswith(b"{"):
                return super().write(line[:10])
            raise OSError(28, "No space left on device")

    recorder._file.close()
    recorder._file = Full(tmp_path / "metrics.jsonl", "ab")
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        for step in range(2, 20):
            recorder.step(record(step))
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == len(read(tmp_path)) == 1
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")


@pytest.mark.parametrize(("columns", "missing"), [("80", "GiB"), ("60", "grad")])
def test_the_bar_fits_a_narrow_terminal(tmp_path, monkeypatch, columns, missing):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", columns)
    stream = Terminal()
    write(tmp_path, range(1, 4), stream=stream)
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).splitlines() if "loss" in line]
    assert lines and all(len(line.rstrip()) <= int(columns) and "tokens/s" in line for line in lines)
    assert not any(missing in line or "…" in line for line in lines)
