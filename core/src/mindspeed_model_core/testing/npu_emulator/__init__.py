"""``torch.device("npu")`` without an Ascend: torch_npu's real Python and C++ over host memory.

torch_npu's wheel links against CANN. Small libraries take CANN's place: device memory is host memory, streams work at
once, HCCL goes through shared memory. torch_npu's own code then runs: dispatch, checks, shapes, derivatives, allocator,
streams, autocast, process groups. Kernels are PyTorch's for the CPU (``aten``) and references for torch_npu's own
operators (``operators``); what has neither raises.

This shows that calls are made as torch_npu wants them and that what is around them is right. It shows nothing of
speed, memory, the hardware's rounding, or what CANN itself accepts: docs/npu.md.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from ...errors import UserError

DEVICES = "MINDSPEED_EMULATED_NPUS"
"""How many NPUs the runtime says there are."""
SITE = "MINDSPEED_EMULATOR_SITE"
"""The folder with torch_npu, where a process is told to install the emulator by its environment."""
_site: Path | None = None


def installed() -> bool:
    """Whether this process has emulated NPUs."""
    return _site is not None


def install(site: Path | str, devices: int = 2) -> None:
    """Make this process one with ``devices`` emulated NPUs, with the torch_npu in the folder ``site``.

    Get it by ``pip install --no-deps --target SITE torch_npu==...``; it must match torch. Must come before anything
    imports torch_npu; child processes that are forked have it too. Raises UserError where it cannot work.
    """
    global _site
    site = Path(site).resolve()
    if _site == site:
        return
    if _site is not None:
        raise RuntimeError(f"the NPU emulator is already installed from {_site}")
    package = site / "torch_npu"
    if not (package / "version.py").is_file():
        raise UserError(f"{site}: no torch_npu in it; pip install --no-deps --target {site} torch_npu")
    if "torch_npu" in sys.modules:
        raise RuntimeError("torch_npu was imported before the NPU emulator")
    if torch.backends.cuda.is_built():
        raise UserError("this is a torch built for CUDA, beside which torch_npu refuses to load; install the CPU build")
    os.environ[DEVICES] = str(devices)
    # A child process must not load torch_npu by its entry point, before the libraries are there.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # Kernels are launched in the calling thread: what a call has written is there when it returns.
    os.environ["TASK_QUEUE_ENABLE"] = "0"
    from . import libraries

    loaded = libraries.load(package)
    sys.path.append(str(site))
    from ...device import npu

    npu.load()
    from . import aten, operators
    from .references import communication

    communication.use(loaded["libhccl"])
    operators.install(ctypes.c_int.in_dll(loaded["libascendcl"], "emulator_checking"))
    aten.install()
    _site = site
