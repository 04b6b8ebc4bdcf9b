"""The device a process works on: an Ascend NPU, a CUDA GPU or the CPU, behind one set of functions."""

from __future__ import annotations

import os
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, nearest

KINDS = ("npu", "cuda", "cpu")
VARIABLE = "MINDSPEED_MODEL_DEVICE"
_recording = False
_aside: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


class NeedsHost(RuntimeError):
    """What is recorded takes something from the host, which would be what it was in each replay."""


def pick(kind: str | None = None) -> torch.device:
    """Return this process's device: the named kind, or the first present of npu, cuda, cpu, at index LOCAL_RANK.

    ``MINDSPEED_MODEL_DEVICE`` names a kind for the whole process. Raises UserError for a kind that is not here.
    """
    field = "device" if kind else VARIABLE
    kind = kind or os.environ.get(VARIABLE) or None
    present = [k for k in KINDS if _present(k)]
    if kind is None:
        kind = present[0]
    elif kind not in present:
        raise UserError(f"{field}={kind!r}: not present on this machine{nearest(kind, present)}")
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
    count = module(device).device_count()
    if (device.index or 0) >= count:
        raise UserError(
            f"--nproc: process {device.index} of this machine has no {kind} device of its own, there "
            f"{'is' if count == 1 else 'are'} {count}; start {count} or fewer on it, or set {VARIABLE}=cpu"
        )
    module(device).set_device(device)
    return device


def _present(kind: str) -> bool:
    if kind == "npu":
        if find_spec("torch_npu") is None:
            return False
        from . import npu

        return npu.available()
    return kind == "cpu" or torch.cuda.is_available()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on the device, sent behind what is queued there.

    It is sent from a copy in memory that stays in place, pinned; from elsewhere the host would wait for the queue.
    """
    if _recording:
        raise NeedsHost
    if device.type == "cpu" or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return tensor.to(device)
    # What is pinned keeps its strides, and one that repeats elements could not be written.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def module(device: torch.device) -> ModuleType:
    """Return torch.npu, torch.cuda or torch.cpu."""
    return torch.get_device_module(device)


def backend(device: torch.device) -> str:
    """Return the process-group backend: the device's own collectives, and gloo for host tensors."""
    name = {"npu": "hccl", "cuda": "nccl"}.get(device.type)
    return f"cpu:gloo,{device.type}:{name}" if name else "gloo"


def group_options(device: torch.device, megabytes: int) -> Any:
    """Return the options of a process group whose communication buffers have this size; None where it is not set."""
    if device.type != "npu":
        return None
    from . import npu

    return npu.group_options(megabytes)


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on the device is done."""
    if device.type != "cpu":
        module(device).synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of ``peak_memory``."""
    if device.type != "cpu":
        module(device).reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes allocated on the device since the last reset; on CPU the process's peak resident size."""
    if device.type != "cpu":
        return int(module(device).max_memory_allocated(device)) + sum(_aside.values())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def recording() -> Iterator[None]:
    """Say that what is queued is recorded, to be done again later and not now."""
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False


def is_recording() -> bool:
    """Return whether what is queued is recorded."""
    return _recording


def set_aside(owner: Any, device: torch.device, pool: Any) -> None:
    """Start a new measurement of ``peak_memory``, in which counts what a pool of CUDA graphs holds.

    That is beside its tensors that live on, and as long as ``owner`` does.
    """
    segments = [each for each in module(device).memory_snapshot() if tuple(each["segment_pool_id"]) == tuple(pool)]
    _aside[owner] = sum(each["total_size"] - each["allocated_size"] for each in segments)
    reset_peak_memory(device)


def free_memory(device: torch.device) -> int:
    """Return the bytes that nothing uses on the device; on CPU this process's part of those of its machine."""
    if device.type != "cpu":
        return int(module(device).mem_get_info(device)[0])
    import psutil

    free = psutil.virtual_memory().available
    limit, used = (_number_in(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:  # a container's, below the machine's
        free = min(free, max(limit - used, 0))
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def name(device: torch.device) -> str:
    """Return the hardware's name, such as ``NVIDIA H200`` or the CPU's model and thread count."""
    if device.type != "cpu":
        return str(module(device).get_device_name(device))
    model = "CPU"
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model} ({os.cpu_count()} threads)"


def profiler(device: torch.device) -> ModuleType:
    """Return the profiler module for the device: torch.profiler, or torch_npu.profiler on an NPU."""
    if device.type == "npu":
        from . import npu

        return npu.profiler()
    return torch.profiler


def activities(device: torch.device) -> list[Any]:
    """Return what the device's profiler can record: the host's side, and after it the device's own, if it has one."""
    kinds = profiler(device).ProfilerActivity
    own = device.type.upper()
    return [kinds.CPU, *([getattr(kinds, own)] if own != "CPU" and hasattr(kinds, own) else [])]


def record_memory(device: torch.device) -> bool:
    """Begin recording allocations for ``memory_snapshot``; False where the device has no allocator history."""
    if device.type == "cpu":
        return False
    # Without the stacks of what is freed: to take one loses the error by which PyTorch ends a block that runs again.
    module(device).memory._record_memory_history(context="alloc", max_entries=100_000)
    return True


def memory_snapshot(device: torch.device, path: Path) -> bool:
    """Write the recorded allocations to ``path`` and stop recording; False where there is none."""
    if device.type == "cpu":
        return False
    # Not by _dump_snapshot: torch_npu's also leaves a table of its own in the working folder, or starts a profiler.
    with path.open("wb") as file:
        pickle.dump(module(device).memory._snapshot(), file)
    module(device).memory._record_memory_history(enabled=None)
    return True


def skips_updates(device: torch.device) -> bool:
    """Return whether PyTorch's fused optimizers heed ``found_inf`` in the kernel; of torch_npu's it is not known."""
    return device.type in ("cpu", "cuda")


def be_deterministic() -> None:
    """Make reruns bit-identical: deterministic kernels only, one autotuning result, fixed workspaces."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("HCCL_DETERMINISTIC", "true")
    os.environ.setdefault("CLOSE_MATMUL_K_SHIFT", "1")  # Ascend: sums of a product in one order
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
