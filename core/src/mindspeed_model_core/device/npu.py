"""Ascend NPUs: the only module that imports torch_npu."""

from __future__ import annotations

from types import ModuleType

import torch


def available() -> bool:
    """Return whether torch_npu loads and sees a device."""
    try:
        import torch_npu  # noqa: F401
    except (ImportError, OSError):
        return False
    return bool(torch.npu.is_available())  # type: ignore[attr-defined]


def profiler() -> ModuleType:
    """Return torch_npu's profiler module."""
    import torch_npu

    return torch_npu.profiler
