"""Record a window of steps with the device's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from . import device as devices
from .recipe import ProfileConfig

FOLDER, SWITCH = "profile", "profile.on"
STEPS = 5
"""Steps of a window that the switch starts, unless the file holds another number."""
_NOTHING: AbstractContextManager[None] = nullcontext()


class Profiler:
    """Profile the steps ``start`` to ``stop`` of the config, and a few steps when ``<run_dir>/profile.on`` is touched.

    Traces go to ``<run_dir>/profile`` in TensorBoard's format (also Perfetto's), one per rank and window; with
    ``memory`` an allocator snapshot goes beside them where the device keeps one. Touching the file starts a window of
    5 steps, or as many as the file says, at the next step; the file is removed when it ends. As a context it writes
    an open window when left. A rank that ``ranks`` does not name does nothing; a step outside a window costs one look
    for the file.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path | str, rank: int, device: torch.device) -> None:
        self._config, self._rank, self._device = config, rank, device
        self._folder, self._switch = Path(run_dir) / FOLDER, Path(run_dir) / SWITCH
        self._active = rank in config.ranks
        self._stop: Callable[[], None] | None = None
        self._first = self._last = 0
        self._switched: tuple[float, int] | None = None
        """When the switch was last obeyed: the file's time, and the last step of that window."""

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, number: int) -> AbstractContextManager[None]:
        """Return the context in which to run step ``number``."""
        if not self._active:
            return _NOTHING
        if self._wanted(number):
            return self._recorded(number)
        self.close()
        return _NOTHING

    def close(self) -> None:
        """End an open window, write it and say where."""
        if self._stop is not None:
            stop, self._stop = self._stop, None
            stop()
            window = f"step {self._first}" if self._first == self._last else f"steps {self._first} to {self._last}"
            print(f"profile of {window} on rank {self._rank} written to {self._folder}", flush=True)

    def _wanted(self, number: int) -> bool:
        start = self._config.start
        if start is not None and start <= number <= (self._config.stop or start):
            return True
        return self._switch_on(number)

    def _switch_on(self, number: int) -> bool:
        """Whether a touched file wants this step. Each rank remembers the touch it obeyed; the first removes it."""
        touched = _touched(self._switch)
        if self._switched is not None and number <= self._switched[1]:
            return True
        if self._switched is not None and touched == self._switched[0]:
            # Not at once: the other ranks may be a step behind.
            if self._rank == min(self._config.ranks) and number > self._switched[1] + 1:
                self._switch.unlink(missing_ok=True)
            return False
        if touched is None:
            return False
        self._switched = (touched, number + _asked(self._switch) - 1)
        return True

    @contextlib.contextmanager
    def _recorded(self, number: int) -> Iterator[None]:
        if self._stop is None:
            self._first, self._stop = number, self._begin(number)
        self._last = number
        try:
            # The name by which TensorBoard's profile view finds steps.
            with torch.profiler.record_function(f"ProfilerStep#{number}"):
                yield
        except BaseException:
            self.close()
            raise
        if not self._wanted(number + 1):
            self.close()

    def _begin(self, number: int) -> Callable[[], None]:
        config, module = self._config, devices.profiler(self._device)
        self._folder.mkdir(parents=True, exist_ok=True)
        worker = f"rank{self._rank}"
        profiler = module.profile(
            activities=devices.activities(self._device),
            record_shapes=config.shapes,
            with_stack=config.stacks,
            profile_memory=config.memory,
            on_trace_ready=module.tensorboard_trace_handler(str(self._folder), worker_name=worker),
        )
        history = config.memory and devices.record_memory(self._device)
        profiler.start()

        def stop() -> None:
            profiler.stop()
            if history:
                devices.memory_snapshot(self._device, self._folder / f"{worker}-step{number}.memory.pickle")

        return stop


def _touched(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def _asked(file: Path) -> int:
    try:
        return max(1, int(file.read_text()))
    except (OSError, ValueError):
        return STEPS
