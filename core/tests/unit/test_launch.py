"""The launcher: what the user sees and what is left running, whichever way a job ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch.distributed  # noqa: F401  imported before forking, so that each launcher starts at once
from mindspeed_model_core import launch
from mindspeed_model_core.errors import UserError

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
import typer
from mindspeed_model_core import cli, launch
from mindspeed_model_core.errors import UserError

here = Path(__file__).parent
rank = int(os.environ.get("RANK", -1))
app = cli._new("A stand-in for a model.", "fake", "fake")

@app.callback()
def options() -> None: ...

@app.command()
def train(word: str, nproc: str = "") -> None:
    if nproc:
        raise typer.Exit(launch.spawn(launch.count(nproc), launch.command_without_nproc(), grace=2.0))
    (here / f"pid{rank}").write_text(str(os.getpid()))
    body(word)

"""


def script(folder: Path, body: str) -> list[str]:
    path = folder / "fake.py"
    text = PRELUDE + "def body(word):\n" + textwrap.indent(textwrap.dedent(body), "    ")
    path.write_text(text + "\ntyper.main.get_command(app)()\n")
    return [sys.executable, str(path), "train", "word"]


class Job:
    """A launcher forked from this process, where torch is imported already, with its stderr in a file."""

    def __init__(self, folder: Path, body: str, ranks: int = 2) -> None:
        self.folder, command = folder, script(folder, body)
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                errors = os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                os.dup2(errors, 2)
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
                status = launch.spawn(ranks, command, grace=1.0)
            finally:
                os._exit(status)

    def ready(self, ranks: int = 2) -> Job:
        """Return when every rank has written its ``ready`` file."""
        wait_for(lambda: all((self.folder / f"ready{rank}").exists() for rank in range(ranks)))
        return self

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """Return the launcher's exit status, negative for a signal, and its stderr."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return status, (self.folder / "stderr").read_text()


@pytest.fixture(autouse=True)
def _alone(monkeypatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(folder: Path) -> None:
    pids = [int(path.read_text()) for path in folder.glob("pid*")]
    assert pids
    wait_for(lambda: not any(alive(pid) for pid in pids), 10)


SERVE = """
def save(*_):
    time.sleep(0.3)
    (here / f"saved{rank}").write_text("")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(here / f"ready{rank}").write_text("")
while True:
    time.sleep(0.05)
"""


def test_ranks_form_a_group(tmp_path: Path) -> None:
    body = """
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    (here / f"out{rank}").write_text(f"{total.item()} {os.environ['LOCAL_RANK']} {os.environ['LOCAL_WORLD_SIZE']}")
    dist.destroy_process_group()
    """
    assert Job(tmp_path, body).wait() == (0, "")
    assert [(tmp_path / f"out{rank}").read_text() for rank in range(2)] == ["3 0 2", "3 1 2"]


def test_the_command_line_starts_itself_again(tmp_path: Path) -> None:
    body = """
    (here / f"out{rank}").write_text(" ".join([word, *sys.argv[1:], os.environ["OMP_NUM_THREADS"]]))
    """
    done = subprocess.run([*script(tmp_path, body), "--nproc=2"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [(tmp_path / f"out{rank}").read_text() for rank in range(2)] == [f"word train word {threads}"] * 2


def test_threads_the_user_chose_stay(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    Job(tmp_path, "(here / f'out{rank}').write_text(os.environ['OMP_NUM_THREADS'])").wait()
    assert (tmp_path / "out1").read_text() == "3"


def test_a_mistake_all_ranks_find_is_one_line(tmp_path: Path) -> None:
    job = Job(tmp_path, "raise UserError('tp=3 does not divide the 4 heads')", ranks=3)
    assert job.wait() == (2, "error: tp=3 does not divide the 4 heads\n")


def test_a_mistake_one_rank_finds_ends_the_others(tmp_path: Path) -> None:
    body = """
    if rank == 1:
        raise UserError("texts/b.txt:7: not UTF-8")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
    """
    begin = time.monotonic()
    assert Job(tmp_path, body).wait() == (2, "error: texts/b.txt:7: not UTF-8\n")
    assert time.monotonic() - begin < 20
    gone(tmp_path)


def test_a_crash_shows_the_first_traceback_only(tmp_path: Path) -> None:
    body = """
    if rank == 1:
        (here / "crashed").write_text("")
        raise RuntimeError("boom")
    while not (here / "crashed").exists():
        pass
    time.sleep(0.03)
    raise ConnectionError("connection closed by peer")
    """
    status, errors = Job(tmp_path, body).wait()
    assert status == 1
    assert errors.count("Traceback") == 1
    assert "RuntimeError: boom" in errors
    assert errors.splitlines()[-1] == "error: rank 1 failed; the other ranks were stopped"


def test_a_killed_rank_ends_the_job_with_one_line(tmp_path: Path) -> None:
    body = """
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    dist.barrier()
    (here / f"ready{rank}").write_text("")
    if rank == 0:
        dist.recv(torch.zeros(1), 1)
    time.sleep(60)
    """
    job = Job(tmp_path, body).ready()
    begin = time.monotonic()
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    status, errors = job.wait()
    assert time.monotonic() - begin < 6
    assert status == 128 + signal.SIGKILL
    (line,) = errors.splitlines()
    assert line.startswith("error: rank 1 was killed (SIGKILL")
    gone(tmp_path)


def test_sigterm_lets_every_rank_save(tmp_path: Path) -> None:
    job = Job(tmp_path, SERVE).ready()
    job.send(signal.SIGTERM)
    assert job.wait() == (0, "")
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()
    gone(tmp_path)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    job = Job(tmp_path, SERVE.replace("time.sleep(0.3)", "(here / f'saving{rank}').write_text(''); time.sleep(60)"))
    job.ready().send(signal.SIGTERM)
    wait_for(lambda: (tmp_path / "saving0").exists() and (tmp_path / "saving1").exists())
    job.send(signal.SIGTERM)
    assert job.wait() == (128 + signal.SIGTERM, "")
    gone(tmp_path)


def test_interrupt_is_quiet(tmp_path: Path) -> None:
    job = Job(tmp_path, "(here / f'ready{rank}').write_text('')\ntime.sleep(60)").ready()
    job.send(signal.SIGINT)
    assert job.wait() == (130, "")
    gone(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent died")
def test_ranks_save_when_the_launcher_is_killed(tmp_path: Path) -> None:
    job = Job(tmp_path, SERVE).ready()
    job.send(signal.SIGKILL)
    assert job.wait()[0] == -signal.SIGKILL
    gone(tmp_path)
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_data_workers_of_a_failed_rank_end_too(tmp_path: Path) -> None:
    body = """
    if os.fork() == 0:
        (here / f"pid-worker{rank}").write_text(str(os.getpid()))
        time.sleep(60)
    while not (here / f"pid-worker{rank}").exists():
        time.sleep(0.02)
    os._exit(3)
    """
    status, errors = Job(tmp_path, body).wait()
    assert status == 3
    assert "failed with exit status 3" in errors
    gone(tmp_path)


def test_under_torchrun_a_shared_mistake_is_printed_once(tmp_path: Path) -> None:
    command = script(tmp_path, "raise UserError('no such file')")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, *command[1:]], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "no such file" in line] == ["error: no such file"]


def test_a_mistake_of_a_later_rank_alone_is_printed_with_its_rank(capsys, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")
    before = signal.getsignal(signal.SIGTERM)
    try:
        launch.report("no such file", wait=0)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "error: rank 9: no such file\n"


def test_nproc_under_torchrun_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="WORLD_SIZE=4 started by torchrun; leave --nproc out"):
        launch.spawn(2, ["true"])


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", ""])
def test_nproc_must_be_a_number_or_auto(value: str) -> None:
    with pytest.raises(UserError, match="1 or more, or auto"):
        launch.count(value)


def test_nproc_auto_counts_accelerators() -> None:
    assert launch.count("auto") >= 1
    assert launch.count("3") == 3


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["train", "x", "--nproc", "2", "a=1"], ["train", "x", "a=1"]),
        (["train", "x", "--nproc=2", "--resume"], ["train", "x", "--resume"]),
        (["train", "--", "x", "--nproc=2"], ["train", "--", "x", "--nproc=2"]),
    ],
)
def test_the_rank_command_keeps_everything_but_nproc(monkeypatch, given: list[str], kept: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", *given])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "package", *given])
    assert launch.command_without_nproc() == [sys.executable, "-X", "dev", "-m", "package", *kept]
