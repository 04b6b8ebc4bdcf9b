"""Keeps processes with a device each from one test to the next, so that imports and contexts are paid for once."""

from __future__ import annotations

import faulthandler
import functools
import gc
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch.multiprocessing as mp
from torch.distributed import TCPStore

from .. import device as devices
from .. import train
from ..recipe import Recipe

TIMEOUT = 180.0
"""Seconds that a case may take, the first one's imports included."""
_SETTLE = 2.0
"""Seconds in which ranks that a failed one broke may say so too."""


class Crew:
    """``world`` processes that wait for cases; they start with the first, and anew after one that failed.

    Each case opens a process group of its own, as a launched command does. A process that has used an accelerator
    cannot be forked: these are spawned. ``device`` names the kind that they use, by default the first present.
    """

    def __init__(self, world: int, *, device: str | None = None, timeout: float = TIMEOUT) -> None:
        self.world, self.device, self.timeout = world, device, timeout
        self._jobs: list[Any] = []
        self._lines: list[Connection] = []
        self._logs: tempfile.TemporaryDirectory[str] | None = None

    def run(self, case: str, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run ``function(*args)``, both picklable by name, on every rank; return plain Python results by rank.

        AssertionError naming the case: with the first failing rank's traceback, a rank that died, or with the stack of
        each rank that does not end within ``timeout`` seconds.
        """
        if not self._jobs:
            self._start()
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        try:
            for line in self._lines:
                line.send((store.port, function, args))
            answers = self._collect(case)
        except BaseException:
            self.close()
            raise
        return [answers[rank] for rank in range(self.world)]

    def close(self) -> None:
        """End the processes at once."""
        for job in self._jobs:
            job.kill()
            job.join()
        for line in self._lines:
            line.close()
        if self._logs is not None:
            self._logs.cleanup()
        self._jobs, self._lines, self._logs = [], [], None

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._logs = tempfile.TemporaryDirectory(prefix="crew-")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            stack = str(self._stack(rank))
            job = context.Process(target=_serve, args=(rank, self.world, self.device, theirs, stack), daemon=True)
            job.start()
            theirs.close()  # so that a rank's death is seen as the end of its line
            self._jobs.append(job)
            self._lines.append(ours)

    def _stack(self, rank: int) -> Path:
        assert self._logs is not None
        return Path(self._logs.name) / f"stack-{rank}"

    def _collect(self, case: str) -> dict[int, Any]:
        answers: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []
        end = time.monotonic() + self.timeout
        open_ranks = set(range(self.world))
        while open_ranks and time.monotonic() < end:
            for rank in sorted(open_ranks):
                if not self._lines[rank].poll(0.01):
                    continue
                open_ranks.discard(rank)
                try:
                    ok, when, said = self._lines[rank].recv()
                except EOFError:
                    self._jobs[rank].join(1.0)
                    # Before all others: a death makes the others fail.
                    ok, when, said = False, 0.0, f"ended with exit status {self._jobs[rank].exitcode}"
                if ok:
                    answers[rank] = said
                else:
                    failures.append((when, rank, said))
                    end = min(end, time.monotonic() + _SETTLE)
        if failures:
            _, rank, said = min(failures)
            raise AssertionError(f"{case}: rank {rank} of {self.world}: {said}")
        if open_ranks:
            raise AssertionError(
                f"{case}: {len(open_ranks)} of {self.world} ranks did not end within {self.timeout:g} s\n"
                + self._stacks(sorted(open_ranks))
            )
        return answers

    def _stacks(self, ranks: list[int]) -> str:
        """Return where each rank is."""
        for rank in ranks:
            if self._stack(rank).exists():  # otherwise it is still importing, and the signal would kill it unheard
                os.kill(self._jobs[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        files = {rank: self._stack(rank) for rank in ranks}
        return "\n".join(f"rank {r}:\n{f.read_text() if f.exists() else 'still starting'}" for r, f in files.items())


@functools.cache
def crew(world: int) -> Crew:
    """Return this session's processes on ``world`` accelerators; they end with it."""
    return Crew(world)


def _serve(rank: int, world: int, device: str | None, line: Connection, stack: str) -> None:
    """Answer cases until the line closes: whether it went well, when, and the result or the traceback."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        # The store is the crew's, as it is the launcher's under launch.spawn; a port for each case.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    if device is not None:
        os.environ[devices.VARIABLE] = device
    with open(stack, "w") as file:
        faulthandler.register(signal.SIGUSR1, file)
        while True:
            try:
                port, function, args = line.recv()
            except EOFError:
                return
            os.environ["MASTER_PORT"] = str(port)
            try:
                answer = (True, time.time(), function(*args))
            except BaseException:
                answer = (False, time.time(), traceback.format_exc())
            line.send(answer)
            gc.collect()  # what a case leaves in cycles would hold the device's memory


def train_losses(where: str, recipe: Recipe, folder: Path) -> list[float]:
    """Train the model at ``where``, as ``package:NAME``, in this process and return the losses; empty but on rank 0."""
    losses: list[float] = []
    train.run(recipe, resolve_name(where), folder, watch=[lambda record: losses.append(record.loss)])
    return losses
