"""The command line: what is printed, what is refused, and with which exit status."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from mindspeed_model_core import cli, launch, ops, train
from mindspeed_model_core.testing import toy
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from toy_zoo import MODEL

SEARCH = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)
TRAINS = replace(toy.TOY, package="toy_zoo")
"""The network of core's own tests under this package's recipes: it really trains."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("MINDSPEED_MODEL_DEVICE", "cpu")
    monkeypatch.setenv("PYTHONPATH", SEARCH)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", launch.REPORT):
        monkeypatch.delenv(name, raising=False)


def call(*args: str, app: typer.Typer | None = None, status: int = 0):
    result = CliRunner().invoke(app or cli.app(MODEL), args)
    assert result.exit_code == status, (result.output, result.stderr, result.exception)
    return result


def refused(*args: str, app: typer.Typer | None = None) -> str:
    """Return the one line on stderr of a command that must end with status 2 and print nothing else."""
    result = call(*args, app=app, status=2)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


COMMANDS = ("recipes", "show", "train", "convert", "measure", "hello")


def test_help_lists_every_command() -> None:
    text = call("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "generate" not in text


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_every_command_teaches_by_example(command: str) -> None:
    assert f"$ mindspeed-toy {command}" in call(command, "--help").stdout


def test_the_help_of_convert_names_both_readers_of_hub_folders() -> None:
    words = re.sub(r"[\s│]+", " ", call("convert", "--help").stdout)
    assert "hub (as transformers or diffusers reads it) or original" in words


def test_no_command_prints_the_help() -> None:
    result = call(status=2)
    assert "recipes" in result.stdout and result.stderr == ""


def test_recipes_are_listed_with_what_they_reproduce() -> None:
    rows = [line.split() for line in call("recipes").stdout.splitlines()]
    assert rows[0] == ["recipe", "preset", "description", "reproduces"]
    assert rows[2] == ["longer", "tiny", "base", "for", "longer", "some-row"]


def test_recipes_are_readable_in_a_narrow_terminal(monkeypatch) -> None:
    """No name is broken over lines; the description is below it."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in call("recipes").stdout.splitlines()]
    assert "longer  preset tiny" in lines and "  reproduces some-row" in lines
    below = lines[lines.index("longer  preset tiny") + 1]
    assert below.startswith("  ") and below.strip() in MODEL.load_recipe("longer").description
    assert all(len(line.rstrip()) <= 40 for line in lines)


def test_show_prints_a_recipe_that_loads_back(tmp_path: Path) -> None:
    overrides = ["steps=7", "parallel.tp=2", "data.length=8"]
    text = call("show", "longer", *overrides).stdout
    wanted = MODEL.load_recipe("longer", overrides)
    (tmp_path / "longer.yaml").write_text(text)
    assert MODEL.load_recipe(str(tmp_path / "longer.yaml")) == wanted
    assert wanted.digest() in text
    assert "34,976" in text
    assert "2 devices: tp 2 x pp 1 x dp 1" in text
    assert "total" in text and "GiB" in text


def test_show_plans_for_any_number_of_devices() -> None:
    assert "8 devices: tp 2 x pp 1 x dp 4" in call("show", "base", "parallel.tp=2", "--nproc", "8").stdout


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("show", "bass"), ("'bass'", "did you mean 'base'")),
        (("train", "bass"), ("'bass'", "did you mean 'base'")),
        (("measure", "bass"), ("'bass'", "did you mean 'base'")),
        (("train", "base", "optim.lrr=1"), ("optim.lrr", "did you mean 'lr'")),
        (("train", "base", "steps=many"), ("steps", "'many'", "integer")),
        (("train", "base", "preset=huge"), ("huge", "tiny")),
        (("show", "base", "parallel.tp=4"), ("parallel.tp=4", "2 heads", "valid: 1, 2")),
        (("show", "base", "parallel.pp=3"), ("parallel.pp=3", "4 blocks", "valid: 1, 2, 4")),
        (("show", "base", "parallel.tp=2", "--nproc", "3"), ("parallel.tp=2", "3 processes")),
        (("show", "base", "--nproc", "0"), ("--nproc", "0")),
        (("measure", "base", "--steps", "0"), ("steps=0",)),
        (("train", "base", "--nproc", "none"), ("--nproc=none", "auto")),
        (("convert", "nowhere", "out", "--layout", "hob"), ("'hob'", "did you mean 'hub'")),
        (("convert", "nowhere", "out"), ("--layout", "mindspeed-toy convert --help")),
        (("train",), ("RECIPE", "mindspeed-toy train --help")),
        (("train", "base", "--resumed"), ("--resumed",)),
        (("trian", "base"), ("trian", "train")),
        (("hello", "nobody"), ("there is nobody",)),
        (("hello", "full"), ("out/model.bin: No space left on device",)),
        (("measure", "base", "--compare", "--baselines", "nowhere"), ("nowhere", "published.csv")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_line_and_writes_nothing(args: tuple[str, ...], parts: tuple[str, ...], tmp_path) -> None:
    line = refused(*args)
    assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


def test_a_models_own_commands_are_registered_by_name() -> None:
    assert call("hello", "you", "--loud").stdout == "YOU\n"
    assert "Whom to greet" in call("hello", "--help").stdout


def test_interrupt_ends_quietly() -> None:
    result = call("hello", "stop", status=130)
    assert result.stdout == "" and result.stderr == ""


def test_a_bug_keeps_its_traceback() -> None:
    result = CliRunner().invoke(cli.app(MODEL), ["hello", "bug"])
    assert isinstance(result.exception, RuntimeError)


def test_train_runs_to_the_default_folder_and_resumes(tmp_path: Path) -> None:
    app = cli.app(TRAINS)
    trackers = "metrics.trackers=[]"
    said = call("train", "base", "steps=2", trackers, app=app).stdout
    assert "runs/toy-base: finished at step 2, saved in runs/toy-base/checkpoints, curve in runs/toy-base/loss" in said
    said = call("train", "base", "steps=2", trackers, "--resume", app=app).stdout
    assert "runs/toy-base: already finished, at step 2; raise steps=2 to go on" in said
    run = tmp_path / "runs" / "toy-base"
    assert (run / "metrics.jsonl").read_text().count("\n") == 2
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    line = refused("train", "base", "steps=2", trackers, app=app)
    assert "--resume" in line and "--run-dir" in line and "runs/toy-base" in line
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
    call("train", "base", "steps=3", trackers, "--resume", app=app)
    assert (run / "metrics.jsonl").read_text().count("\n") == 3
    call("train", "base", "steps=1", trackers, "--run-dir", "other", app=app)
    assert (tmp_path / "other" / "recipe.yaml").exists()


def test_an_interrupted_run_says_how_to_go_on(monkeypatch) -> None:
    ended = train.Run(step=3, loss=1.0, folder=Path("runs/toy-base"), finished=False, signal=signal.SIGINT)
    monkeypatch.setattr(train, "run", lambda *_, **__: ended)
    said = call("train", "base", "steps=9", app=cli.app(TRAINS), status=130).stdout
    assert said == "runs/toy-base: stopped at step 3 of 9, saved in runs/toy-base/checkpoints; continue with --resume\n"


def test_no_memory_on_the_host_is_one_line(monkeypatch) -> None:
    def run(*_, **__):
        torch.empty(2**60)

    monkeypatch.setattr(train, "run", run)
    assert "not enough memory on the host" in refused("train", "base", app=cli.app(TRAINS))


def test_resume_without_a_checkpoint_begins_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "fresh").mkdir()
    args = ("train", "base", "steps=1", "metrics.trackers=[]", "--run-dir", "fresh", "--resume")
    result = call(*args, app=cli.app(TRAINS))
    assert "fresh: no checkpoint to resume from, starting from the beginning" in result.stderr
    assert (tmp_path / "fresh" / "metrics.jsonl").read_text().count("\n") == 1


def test_a_resumed_run_says_where_it_goes_on(tmp_path: Path) -> None:
    args = ("train", "base", "metrics.trackers=[]", "--run-dir", "twice")
    call(*args, "steps=1", app=cli.app(TRAINS))
    assert "twice: continues after step 1" in call(*args, "steps=2", "--resume", app=cli.app(TRAINS)).stderr


def test_nproc_runs_the_same_command_on_ranks(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(sys, "argv", ["prog", "train", "base", "steps=1", "--nproc", "2"])
    monkeypatch.setattr(launch, "spawn", lambda nproc, command: seen.append((nproc, command[-3:])) or 5)
    call("train", "base", "steps=1", "--nproc", "2", status=5)
    assert seen == [(2, ["train", "base", "steps=1"])]


def test_nproc_under_torchrun_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave --nproc out" in refused("train", "base", "--nproc", "2")


def test_a_layout_that_needs_more_processes_says_how_many() -> None:
    assert "--nproc 2" in refused("train", "base", "parallel.tp=2", app=cli.app(TRAINS))


def test_a_recipe_is_checked_before_ranks_start(monkeypatch) -> None:
    monkeypatch.setattr(launch, "spawn", lambda *_: pytest.fail("ranks were started"))
    assert "did you mean 'steps'" in refused("train", "base", "step=1", "--nproc", "2")


def test_measure_prints_its_result_and_writes_nothing(tmp_path: Path) -> None:
    out = call("measure", "base", "--steps", "2", "--warmup", "1", app=cli.app(TRAINS)).stdout
    assert "median of 2" in out and "MFU" in out
    named = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert {"data", "forward", "backward", "optimizer"} <= set(named)
    assert "mean of 2 more" in out and "not told on a CPU" in out
    assert "that matrix products reach here" in out and "that copies reach here" in out
    assert list(tmp_path.iterdir()) == []


def test_versions() -> None:
    assert "mindspeed-model-core" in call("--version").stdout
    assert call("--version", app=cli.common_app()).stdout.startswith("mindspeed-model-core ")


def installed(folder: Path, name: str) -> None:
    """Make a folder look like an installed model package."""
    info = folder / f"mindspeed_model_{name}-1.2.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mindspeed-model-{name}\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text(
        f"[console_scripts]\nmindspeed-{name} = absent:cli\n[mindspeed_model]\n{name} = absent:MODEL\n"
    )


def test_list_names_installed_models_without_importing_them(tmp_path: Path, monkeypatch) -> None:
    installed(tmp_path, "wonder")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [line.split() for line in call("list", app=cli.common_app()).stdout.splitlines()]
    assert ["wonder", "1.2.3", "mindspeed-wonder", "mindspeed-model-wonder"] in rows


def test_list_of_nothing_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda group: [])
    assert "pip install" in refused("list", app=cli.common_app())


def ops_shown(*args: str) -> tuple[list[list[str]], str]:
    """Return the table's rows, a cell where two blanks end it, and the last line."""
    lines = call("ops", *args, app=cli.common_app()).stdout.splitlines()
    return [re.split(r"  +", line.strip()) for line in lines[:-2]], lines[-1]


def test_ops_says_what_serves_each_on_a_device() -> None:
    rows, last = ops_shown("--device", "npu")
    assert rows[0] == ["op", "level", "served by", "for"]
    assert ["swiglu", "1", "npu_swiglu npu_swiglu_backward", "fp16, bf16, fp32"] in rows
    assert ["swiglu", "0", "reference", "the rest"] in rows
    assert last.startswith("npu; level: the recipe's optimization_level; ")
    rows, last = ops_shown()  # this machine's: the CPU's
    assert {row[0] for row in rows[1:]} == set(ops.TABLE)
    assert ["swiglu", "0", "reference", "all: no cpu entry"] in rows and last.startswith("cpu; ")
    assert ["swiglu", "1", "torch.compile", "all"] in ops_shown("--device", "cuda")[0]
    assert "swiglu" not in {row[0] for row in ops_shown("--device", "cuda")[0] if row[2] == "reference"}


def test_ops_at_level_0_are_the_reference(monkeypatch) -> None:
    monkeypatch.setattr("mindspeed_model_core.ops.table._forced", lambda: True)
    rows, last = ops_shown("--device", "npu")
    assert {row[2] for row in rows[1:]} == {"reference"}
    assert ["swiglu", "0", "reference", "all: level 0"] in rows
    assert last == "npu; level: 0 for all; MINDSPEED_MODEL_OPS=reference makes it 0"


def test_ops_refuses_an_unknown_device() -> None:
    said = refused("ops", "--device", "gpu", app=cli.common_app())
    assert said == "error: --device=gpu: not a kind of device; did you mean 'cuda'? (known: cpu, cuda, npu)"


def test_starting_imports_neither_torch_nor_a_model() -> None:
    code = "import sys; import mindspeed_model_core.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_console_script_ends_with_the_commands_status(tmp_path: Path) -> None:
    code = "from mindspeed_model_core.cli import run; from toy_zoo import MODEL; run(MODEL)"
    done = subprocess.run([sys.executable, "-c", code, "show", "bass"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1


def test_a_number_that_hangs_on_free_memory_is_not_recorded() -> None:
    assert (
        "recompute=auto" in (said := refused("measure", "base", "recompute=auto", "--record")) and "recompute=N" in said
    )
