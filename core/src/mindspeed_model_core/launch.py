"""Start one process per device on this machine, pass signals on, and say once what went wrong."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from .errors import UserError

REPORT = "MINDSPEED_MODEL_REPORT"
"""Environment variable: the file in which a rank started by ``spawn`` leaves why it failed."""

_PARENT = "MINDSPEED_MODEL_LAUNCHER"
_CAUSES = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}
_POLL = 0.05
_SETTLE = 0.3
"""Seconds after a rank failed in which others may fail too, before it is decided which came first."""
_PR_SET_PDEATHSIG = 1


def count(nproc: str) -> int:
    """Return the number of processes ``--nproc`` asks for: a number, or ``auto`` for one per accelerator."""
    if nproc == "auto":
        import torch

        return max(1, torch.accelerator.device_count())
    if not nproc.isdecimal() or int(nproc) < 1:
        raise UserError(f"--nproc={nproc}: write a number of processes, 1 or more, or auto (one per accelerator)")
    return int(nproc)


def first_rank() -> bool:
    """Whether this process is rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def refuse_nested() -> None:
    """Raise UserError where torchrun has already started the ranks."""
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            f"--nproc: this process is already one of WORLD_SIZE={os.environ['WORLD_SIZE']} started by torchrun; "
            "leave --nproc out"
        )


def command_without_nproc() -> list[str]:
    """Return this process's own command line, interpreter and its options included, without ``--nproc``."""
    given = sys.argv[1:]
    head = sys.orig_argv[1 : len(sys.orig_argv) - len(given)]
    kept: list[str] = []
    words = iter(given)
    for word in words:
        if word == "--":
            kept += [word, *words]
        elif word == "--nproc":
            next(words, None)
        elif not word.startswith("--nproc="):
            kept.append(word)
    return [sys.executable, *head, *kept]


def spawn(nproc: int, command: Sequence[str], *, grace: float = 5.0) -> int:
    """Run ``command`` as ``nproc`` ranks of one torch.distributed job on this machine; return its exit status.

    The environment is torchrun's (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ...) and this process holds the store the
    ranks meet at, so no port is guessed. SIGTERM, SIGINT and SIGHUP go to every rank, which may take the time it needs
    to save; a second signal ends them at once. When one rank fails the others are ended within ``grace`` seconds.
    One line on stderr names the cause: a UserError as it is, else the rank that failed first.
    """
    refuse_nested()
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="mindspeed-") as folder, _Ranks(Path(folder), grace) as ranks:
        ranks.start(nproc, command, store.port)
        ranks.wait()
        return ranks.verdict()


class _Ranks:
    """The processes of one job."""

    def __init__(self, folder: Path, grace: float) -> None:
        self.folder, self.grace = folder, grace
        self.nproc = 0
        self.live: dict[int, subprocess.Popen[bytes]] = {}
        self.failed: dict[int, int] = {}
        """Exit status of the ranks that failed by themselves; negative for the signal that killed one."""
        self.signals: list[int] = []
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> _Ranks:
        with suppress(ValueError):  # signals belong to the main thread; elsewhere they stay as they are
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._send(signal.SIGKILL)
        for process in self.live.values():
            process.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def start(self, nproc: int, command: Sequence[str], port: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shared = {
            "WORLD_SIZE": nproc,
            "LOCAL_WORLD_SIZE": nproc,
            "GROUP_RANK": 0,
            "GROUP_WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_MAX_RESTARTS": 0,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            _PARENT: os.getpid(),
        }
        self.nproc = nproc
        for rank in range(nproc):
            own = {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank, REPORT: self._report(rank)}
            env = {"OMP_NUM_THREADS": str(max(1, cores // nproc)), **os.environ}
            env.update({key: str(value) for key, value in {**shared, **own}.items()})
            # A session of its own: a rank's data workers end with it, and Ctrl-C reaches it once, through us.
            self.live[rank] = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
            if self.signals:
                self.live[rank].send_signal(self.signals[0])

    def wait(self) -> None:
        """Return when every rank has ended."""
        settled = stopping = math.inf
        while self.live:
            for rank, process in list(self.live.items()):
                status = process.poll()
                if status is not None:
                    del self.live[rank]
                    if status:
                        _signal_group(process, signal.SIGKILL)  # the data workers it left behind
                elif self._report(rank).exists():
                    status = 1
                if status and stopping == math.inf and rank not in self.failed:
                    self.failed[rank] = status
            now = time.monotonic()
            if self.failed and settled == math.inf:
                settled = now + _SETTLE
            if now > settled and stopping == math.inf:
                stopping = now + self.grace
                self._send(signal.SIGTERM)
            if now > stopping:
                self._send(signal.SIGKILL)
            time.sleep(_POLL)

    def verdict(self) -> int:
        """Say why the job failed, if it did, and return its exit status."""
        if not self.failed:
            return 0
        told = {path.stem: json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))}
        users = [told[rank] for rank in sorted(told, key=int) if told[rank]["trace"] is None]
        if users:
            _say(users[0]["message"])
            return users[0]["status"]
        number = self.signals[0] if self.signals else 0
        if len(self.signals) > 1 or (number and {130, 128 + number, -number}.issuperset(self.failed.values())):
            return 128 + number
        # A kill or a fault made the others fail, not the other way round; of exceptions the first did. An abort may be
        # a communication library's answer to another rank's end.
        rank, status = min(
            self.failed.items(), key=lambda f: (f[1] not in _CAUSES, told.get(str(f[0]), {}).get("time", math.inf))
        )
        if trace := told.get(str(rank), {}).get("trace"):
            print(trace, file=sys.stderr, end="")
        others = "; the other ranks were stopped" if self.nproc > 1 else ""
        if status == -signal.SIGKILL:
            _say(f"rank {rank} was killed (SIGKILL: by hand, or the machine ran out of memory){others}")
        elif status < 0:
            _say(f"rank {rank} was ended by {signal.Signals(-status).name}{others}")
        else:
            _say(f"rank {rank} failed{'' if trace else f' with exit status {status}'}{others}")
        return status if status > 0 else 128 - status

    def _report(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.signals.append(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        self._send(self.signals[0] if len(self.signals) == 1 else signal.SIGKILL)

    def _send(self, number: int) -> None:
        for process in list(self.live.values()):
            if number == signal.SIGKILL:
                _signal_group(process, number)
            else:
                process.send_signal(number)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _say(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def follow_launcher() -> None:
    """In a rank started by ``spawn``: ask to receive SIGTERM, and so save, should the launcher itself be killed."""
    parent = os.environ.get(_PARENT)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        signal.raise_signal(signal.SIGTERM)


def report(message: str, *, status: int = 2, wait: float = 3.0) -> None:
    """Tell the user about a mistake once, however many ranks found it.

    Alone, and on the first rank of a machine: a line on stderr. In a rank of ``spawn``: left for the launcher. Under
    another launcher, the further ranks wait ``wait`` seconds: torchrun ends them meanwhile if the first rank failed
    too; if it did not, the mistake is theirs alone and they print it.
    """
    if REPORT in os.environ:
        _leave(message, status, None)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local == 0:
        _say(message)
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(wait)
    _say(f"rank {os.environ.get('RANK', local)}: {message}")


@contextmanager
def crashes() -> Iterator[None]:
    """In a rank of ``spawn``, leave an unexpected exception's traceback for the launcher, which prints the first."""
    try:
        yield
    except Exception as error:
        if REPORT not in os.environ:
            raise
        _leave(str(error), 1, traceback.format_exc())
        sys.exit(1)


def _leave(message: str, status: int, trace: str | None) -> None:
    path = Path(os.environ[REPORT])
    temporary = path.with_suffix(".tmp")
    with suppress(OSError):  # the launcher and its folder may be gone
        temporary.write_text(json.dumps({"message": message, "status": status, "trace": trace, "time": time.time()}))
        os.replace(temporary, path)
