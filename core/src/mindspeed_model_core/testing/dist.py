"""Runs a function in several processes of this machine, forked after the imports are paid for."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .. import device as devices
from ..parallel import facade

TIMEOUT = 120.0
_NEEDED = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
)


def preload(kind: str = "cpu") -> None:
    """Import what the forked processes will need, once."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    facade.install(torch.device(kind))
    for name in _NEEDED:
        import_module(name)


def _enter(rank: int, world: int, kind: str, function: Callable[..., Any], folder: str, args: Any, kwargs: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MINDSPEED_MODEL_DEVICE=kind, OMP_NUM_THREADS="1"
    )
    torch.set_num_threads(1)
    status = 1
    try:
        dist.init_process_group(
            devices.backend(devices.pick()),
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=60),
        )
        result = function(*args, **kwargs)
        torch.save(result, Path(folder) / f"result-{rank}")
        if dist.is_initialized():
            dist.barrier()
        status = 0
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(status)


def run_dist(function: Callable[..., Any], world: int, *args: Any, **kwargs: Any) -> list[Any]:
    """Run ``function(*args, **kwargs)`` in ``world`` processes joined by gloo; return their results by rank.

    Raises AssertionError with the first failing rank's traceback, or when they take longer than two minutes.
    """
    return run_on("cpu", function, world, *args, **kwargs)


def run_on(kind: str, function: Callable[..., Any], world: int, *args: Any, **kwargs: Any) -> list[Any]:
    """Run as ``run_dist`` does, each process on its own device of a kind: ``cpu``, or ``npu`` on the emulator.

    The device must not be in use in this process yet: its state would not survive the fork.
    """
    module = torch.get_device_module(kind)
    if kind != "cpu" and module.is_initialized():
        raise RuntimeError(f"this process uses an {kind} itself, so the processes that it forks cannot")
    preload(kind)
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            context.Process(target=_enter, args=(r, world, kind, function, folder, args, kwargs)) for r in range(world)
        ]
        for job in jobs:
            job.start()
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end and any(j.is_alive() for j in jobs) and not any(j.exitcode for j in jobs):
            time.sleep(0.01)
        time.sleep(0.2 if any(j.exitcode for j in jobs) else 0)
        late = [j for j in jobs if j.is_alive()]
        for job in jobs:
            job.kill()
            job.join()
        errors = sorted(Path(folder).glob("error-*"), key=lambda p: p.stat().st_mtime)
        if errors:
            raise AssertionError(f"{errors[0].name}:\n{errors[0].read_text()}")
        if late:
            raise AssertionError(f"{len(late)} of {world} processes did not end within {TIMEOUT:.0f} s")
        return [torch.load(Path(folder) / f"result-{r}", weights_only=False) for r in range(world)]
