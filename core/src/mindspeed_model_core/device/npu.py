"""Ascend NPUs: the only module that imports torch_npu."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch


def load() -> None:
    """Import torch_npu, which adds the device to torch."""
    import torch_npu  # noqa: F401


def available() -> bool:
    """Return whether torch_npu loads and sees a device."""
    try:
        load()
    except (ImportError, OSError):
        return False
    return bool(torch.npu.is_available())  # type: ignore[attr-defined]


def profiler() -> ModuleType:
    """Return torch_npu's profiler module."""
    import torch_npu

    return torch_npu.profiler


def group_options(megabytes: int) -> Any:
    """Return the options of an HCCL group whose two buffers have this size each."""
    import torch_npu

    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    options.hccl_config = {"hccl_buffer_size": megabytes}
    return options
