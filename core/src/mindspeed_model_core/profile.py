"""Record a window of steps with the device's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from . import device as devices
from .recipe import ProfileConfig

FOLDER, SWITCH = "profile", "profile.on"
_NOTHING: AbstractContextManager[None] = nullcontext()


class Profiler:
    """Profile the steps ``start`` to ``stop`` of the config, and any step while ``<run_dir>/profile.on`` exists.

    Traces go to ``<run_dir>/profile`` in TensorBoard's format (also Perfetto's), one per rank and window; with
    ``memory`` an allocator snapshot goes beside them where the device keeps one. Touching the file starts a window at
    the next step, removing it ends the window. As a context it writes an open window when left. A rank that ``ranks``
    does not name does nothing; a step outside a window costs one look for the file.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path | str, rank: int, device: torch.device) -> None:
        self._config, self._rank, self._device = config, rank, device
        self._folder, self._switch = Path(run_dir) / FOLDER, Path(run_dir) / SWITCH
        self._active = rank in config.ranks
        self._stop: Callable[[], None] | None = None

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
        """End an open window and write it."""
        if self._stop is not None:
            stop, self._stop = self._stop, None
            stop()

    def _wanted(self, number: int) -> bool:
        start = self._config.start
        if start is not None and start <= number <= (self._config.stop or start):
            return True
        return self._switch.exists()

    @contextlib.contextmanager
    def _recorded(self, number: int) -> Iterator[None]:
        if self._stop is None:
            self._stop = self._begin(number)
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
        kinds: list[Any] = [module.ProfilerActivity.CPU]
        own = self._device.type.upper()
        if own != "CPU" and hasattr(module.ProfilerActivity, own):
            kinds.append(getattr(module.ProfilerActivity, own))
        profiler = module.profile(
            activities=kinds,
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
