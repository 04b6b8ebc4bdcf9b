from __future__ import annotations

import csv
import io
import math
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.peak import Peak
from mindspeed_model_core.perf import Measurement, baseline, display, provenance
from rich.console import Console

REPOSITORY = Path(__file__).resolve().parents[3]
LLAMA_7B = "llama2-7b-pretrain-mindspeed-llm-2.3"

MEASURED = Measurement(
    model="llama2",
    recipe="7b-pretrain",
    reproduces=LLAMA_7B,
    digest="0123456789ab",
    precision="bf16",
    device="cuda",
    hardware="NVIDIA H200",
    devices=8,
    stack="torch 2.9.0, cuda 12.8, python 3.11.9",
    commit="a1b2c3d4e5f6",
    date="2026-05-01",
    task_unit="tokens",
    steps=10,
    warmup=3,
    step_s=2.0,
    quartiles=(1.99, 2.01),
    samples_per_s=16.0,
    units_per_s=65536.0,
    flops=4e14,
    peak=Peak(8e14, "data sheet"),
    peak_bytes=60 * 2**30,
)


def times(factor: float, **changes) -> Measurement:
    return replace(MEASURED, units_per_s=65536 * factor, samples_per_s=16 * factor, flops=4e14 * factor, **changes)


@pytest.fixture
def where(tmp_path) -> Path:
    folder = tmp_path / "perf_baselines"
    folder.mkdir()
    (folder / "published.csv").write_bytes((REPOSITORY / "perf_baselines" / "published.csv").read_bytes())
    return folder


# --- the files in the repository ---


def test_published_rows_are_whole():
    rows = baseline.published(REPOSITORY / "perf_baselines")
    assert len(rows) == 114
    assert len({r.id for r in rows}) == len(rows)
    assert all(r.source and r.release and r.devices >= 1 for r in rows)
    assert {r.model for r in rows} == {
        "", "flux", "internvl3", "llama2", "opensoraplan15", "qwen25vl", "wan21", "whisper"
    }  # fmt: skip
    seven = baseline.find(REPOSITORY / "perf_baselines", LLAMA_7B)
    assert (seven.npu, seven.unit, seven.devices) == (69.0, "% MFU", 8)
    wan = baseline.find(REPOSITORY / "perf_baselines", "wan2.1-t2v-14b-pretrain-mindspeed-mm-2.2")
    assert (wan.npu, wan.reference, wan.model) == (0.16, 0.16, "wan21")
    a3 = baseline.find(REPOSITORY / "perf_baselines", "internvl-3.0-78b-finetune-mindspeed-mm-2.2")
    assert a3.devices == 64


def test_recorded_files_can_be_read():
    files = [f for f in (REPOSITORY / "perf_baselines").glob("*.csv") if f.name not in ("published.csv", "peers.csv")]
    assert "llama2.csv" in {f.name for f in files}
    ids = {r.id for r in baseline.published(REPOSITORY / "perf_baselines")}
    for file in files:
        for row in baseline.read(file.parent, file.stem):
            assert row.reproduces in {"", *ids}
            assert row.commit and row.value > 0
    assert all(row.libraries and row.ours > 0 for row in baseline.read_peers(REPOSITORY / "perf_baselines"))


# --- finding the folder ---


def test_the_folder_is_found_from_below(where, monkeypatch):
    monkeypatch.delenv(baseline.VARIABLE, raising=False)
    inside = where.parent / "models" / "x"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert baseline.folder() == where


def test_option_then_variable_then_error(where, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    monkeypatch.delenv(baseline.VARIABLE, raising=False)
    with pytest.raises(UserError, match="--baselines DIR or MINDSPEED_MODEL_BASELINES=DIR"):
        baseline.folder()
    monkeypatch.setenv(baseline.VARIABLE, str(where))
    assert baseline.folder() == where
    with pytest.raises(UserError, match=r"--baselines=.*no published\.csv in it"):
        baseline.folder(elsewhere)


def test_an_unknown_id_names_the_nearest(where):
    with pytest.raises(UserError, match=rf"did you mean '{LLAMA_7B}'"):
        baseline.find(where, "llama2-7b-pretrain-mindspeed-llm-2.4")


# --- recording ---


def test_a_record_reads_back(where):
    row = baseline.record(MEASURED, where)
    assert baseline.read(where, "llama2") == [row]
    # 69 % MFU was published, but what is gated is the speed.
    assert (row.unit, row.value, row.mfu, row.peak_gib) == ("tokens/s/device", 8192.0, 0.5, 60.0)
    assert (row.spread, row.step_s, row.reproduces) == (0.01, 2.0, LLAMA_7B)
    second = baseline.record(times(1.1, date="2026-05-02"), where)
    assert baseline.read(where, "llama2") == [row, second]
    assert [f.name for f in where.iterdir() if f.name.startswith(".")] == []


def test_a_published_rate_is_recorded_in_its_unit(where):
    row = baseline.record(replace(MEASURED, reproduces="llama2-7b-full-finetune-16384-mindspeed-llm-2.3"), where)
    assert (row.unit, row.value) == ("samples/s", 16.0)


def test_a_measured_peak_gives_no_mfu(where):
    row = baseline.record(replace(MEASURED, peak=Peak(8e14, "measured matmul")), where)
    assert row.mfu is None and row.note == "50.0% of a measured matmul"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"commit": None}, "commit is not known"),
        ({"commit": "unknown"}, "commit is not known"),
        ({"commit": "a1b2c3+dirty"}, "the sources hold changes"),
        ({"digest": ""}, "digest is not known"),
        ({"hardware": " "}, "hardware is not known"),
        ({"stack": ""}, "stack is not known"),
        ({"steps": 4}, "--steps=4: 5 or more timed steps are needed"),
        ({"units_per_s": math.nan}, "not a positive number"),
        ({"reproduces": "llama2-7b"}, "no such id"),
    ],
)
def test_no_origin_no_record(where, changes, message):
    with pytest.raises(UserError, match=message):
        baseline.record(replace(MEASURED, **changes), where)
    assert not (where / "llama2.csv").exists()


def test_dirty_sources_may_be_allowed_and_stay_marked(where):
    assert baseline.record(replace(MEASURED, commit="a1b2c3+dirty"), where, allow_dirty=True).commit == "a1b2c3+dirty"


def _record_some(where: Path, start: int) -> None:
    for i in range(start, start + 10):
        baseline.record(replace(MEASURED, digest=f"{i:012d}"), where)


def test_records_made_at_once_are_all_kept(where):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_record_some, args=(where, start)) for start in (0, 10, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(int(r.digest) for r in baseline.read(where, "llama2")) == list(range(30))


def test_a_failed_write_leaves_the_file(where, monkeypatch):
    baseline.record(MEASURED, where)
    before = (where / "llama2.csv").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        baseline.record(times(2.0), where)
    assert (where / "llama2.csv").read_bytes() == before
    assert sorted(f.name for f in where.iterdir()) == ["llama2.csv", "published.csv"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.replace("hardware,", "machine,", 1), r"llama2\.csv:1: the columns are"),
        (lambda t: t.replace("8192.0", "fast"), r"llama2\.csv:2: value='fast' is not a number"),
        (lambda t: t.replace("8192.0", "nan"), r"llama2\.csv:2: value='nan' is not a number"),
        (lambda t: t.replace("0123456789ab,", ""), r"llama2\.csv:2: 15 cells for 16 columns"),
    ],
)
def test_a_broken_file_is_named(where, edit, message):
    baseline.record(MEASURED, where)
    path = where / "llama2.csv"
    path.write_text(edit(path.read_text()))
    with pytest.raises(UserError, match=message):
        baseline.read(where, "llama2")


# --- comparing ---


@pytest.mark.parametrize(
    ("factor", "device", "status"),
    [
        (1.0, "cuda", "within"),
        (0.96, "cuda", "within"),
        (1.04, "cuda", "within"),
        (0.94, "cuda", "slower"),
        (1.06, "cuda", "faster (record it)"),
        (0.94, "cpu", "within"),
        (0.89, "cpu", "slower"),
        (1.11, "cpu", "faster (record it)"),
    ],
)
def test_the_gate_has_two_sides(where, factor, device, status):
    baseline.record(MEASURED, where)
    verdict = baseline.compare(times(factor, device=device), baseline.read(where, "llama2"))
    assert verdict.status == status
    assert verdict.failed == (status not in ("within", "no baseline"))
    assert verdict.ratio == pytest.approx(factor)


def test_only_the_same_work_on_the_same_hardware_compares(where):
    baseline.record(MEASURED, where)
    rows = baseline.read(where, "llama2")
    for changes in ({"hardware": "NVIDIA H100"}, {"devices": 4}, {"digest": "f" * 12}):
        verdict = baseline.compare(replace(MEASURED, **changes), rows)
        assert verdict.status == "no baseline" and not verdict.failed


def test_the_newest_row_counts(where):
    baseline.record(MEASURED, where)
    baseline.record(times(2.0), where)
    assert baseline.compare(times(2.0), baseline.read(where, "llama2")).status == "within"


def test_a_row_may_have_its_own_tolerance_which_is_kept(where):
    first = baseline.record(MEASURED, where)
    wide = replace(first, tolerance=0.3)
    assert baseline.compare(times(0.75), [wide]).status == "within"
    assert baseline.compare(times(0.65), [wide]).status == "slower"
    path = where / "llama2.csv"
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    lines[1][lines[0].index("tolerance")] = "0.3"
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    assert baseline.record(times(0.9), where).tolerance == 0.3


# --- telling ---


def said(run) -> str:
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    run(console)
    return console.export_text()


def test_report_gates_and_records(where):
    status: list[int] = []

    def report(measured, **flags) -> str:
        return said(lambda c: status.append(baseline.report(measured, where, console=c, **flags)))

    text = report(MEASURED)
    assert status.pop() == 0 and "no baseline" in text
    assert "69 % MFU" in text and "here 50 % MFU, 0.72 x" in text
    report(MEASURED, keep=True)
    assert status.pop() == 0 and len(baseline.read(where, "llama2")) == 1
    text = report(times(0.8), gate=True)
    assert status.pop() == 1 and "slower, -20.0% against 8,192 tokens/s/device" in text
    text = report(times(1.3), gate=True)
    assert status.pop() == 1 and "faster (record it)" in text
    report(times(1.3))
    assert status.pop() == 0
    report(times(1.3), gate=True, keep=True)
    assert status.pop() == 0
    report(times(1.3), gate=True)
    assert status.pop() == 0


def test_only_rank_0_reports(where, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert said(lambda c: baseline.report(MEASURED, where, keep=True, console=c)) == ""
    assert not (where / "llama2.csv").exists()


def test_global_speeds_of_other_device_counts_give_no_ratio(where):
    sft = "llama2-7b-full-finetune-16384-mindspeed-llm-2.3"
    text = said(lambda c: baseline.report(replace(MEASURED, reproduces=sft), where, console=c))
    assert "here 16 samples/s, 14.04 x" in text
    text = said(lambda c: baseline.report(replace(MEASURED, reproduces=sft, devices=1), where, console=c))
    assert "on other terms (1 x NVIDIA H200)" in text and " x\n" not in text


def test_prepare_refuses_before_measuring(where, monkeypatch):
    def prepare(record: bool = True, allow_dirty: bool = False, steps: int = 5) -> Path:
        return baseline.prepare("pkg", LLAMA_7B, steps=steps, baselines=where, record=record, allow_dirty=allow_dirty)

    monkeypatch.setattr(provenance, "commit", lambda *_, **__: "abc+dirty")
    with pytest.raises(UserError, match="the sources hold changes"):
        prepare()
    assert prepare(allow_dirty=True) == prepare(record=False, steps=1) == where
    with pytest.raises(UserError, match="--steps=4: 5 or more timed steps"):
        prepare(allow_dirty=True, steps=4)
    monkeypatch.setattr(provenance, "commit", lambda *_, **__: None)
    with pytest.raises(UserError, match="commit is not known"):
        prepare()


def test_the_table_holds_published_and_measured(where):
    baseline.record(MEASURED, where)
    text = said(lambda c: c.print(display.table(where, "llama2")))
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("Llama2 7B pretrain"))
    assert "69 % MFU" in lines[at]
    assert "7b-pretrain" in lines[at + 1] and "8,192 tokens/s/device" in lines[at + 1] and "0.72 x" in lines[at + 1]


def test_a_narrow_table_breaks_no_word(where):
    assert "published, nothing measured yet" in said(lambda c: c.print(display.table(where, "llama2")))
    baseline.record(MEASURED, where)
    console = Console(width=80, file=io.StringIO())
    console.print(display.table(where, "llama2", console.width))
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    for whole in (
        "llama2: measured against published",
        "Llama2 7B pretrain",
        "8 x Atlas 900 A2 PODc",
        "tokens/s/device",
    ):
        assert whole in text


def test_charts(where, tmp_path):
    baseline.record(MEASURED, where)
    baseline.record(replace(MEASURED, hardware="CPU x2", recipe="demo", digest="f" * 12, reproduces=None), where)
    for model in ("llama2", "wan21", "qwen25vl"):
        path = display.plot(where, model, tmp_path / f"{model}.png")
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert display.plot(where, "llama2", tmp_path / "chart.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match="nothing published and nothing measured.*did you mean 'llama2'"):
        display.plot(where, "llama3", tmp_path / "x.png")


def test_the_newest_row_of_each_hardware_is_told(where):
    old, new = baseline.record(MEASURED, where), baseline.record(times(1.5), where)
    other = baseline.record(replace(MEASURED, devices=1), where)
    assert baseline.latest([old, new, other]) == [new, other]


def test_mfu_meets_mfu_and_rates_meet_rates(where):
    baseline.record(MEASURED, where)
    panels = dict(display._panels(display._grouped(where, "llama2")))
    assert list(panels) == ["% MFU", "samples/s", "tokens/s/device"]
    label, mark, values = panels["% MFU"][0]
    assert (label, mark.npu, [v for _, v in values]) == ("7b-pretrain", 69.0, [50.0])
    label, mark, values = panels["tokens/s/device"][0]
    assert (mark, [v for _, v in values]) == (None, [8192.0])
    assert all(not values for _, _, values in panels["samples/s"])


def test_comparing_with_nothing_fails_and_says_how_to_record(where):
    with pytest.raises(
        UserError, match=r"llama2.csv holds no speed .* the same command with --record adds it"
    ) as caught:
        said(lambda c: baseline.report(MEASURED, where, console=c, gate=True))
    assert MEASURED.digest in str(caught.value) and "\n" not in str(caught.value)
    baseline.record(replace(MEASURED, digest="another"), where)
    with pytest.raises(UserError, match=r"recorded there: digest another"):
        said(lambda c: baseline.report(MEASURED, where, console=c, gate=True))
    assert said(lambda c: baseline.report(MEASURED, where, console=c, gate=True, keep=True))
    assert said(lambda c: baseline.report(MEASURED, where, console=c, gate=True))
