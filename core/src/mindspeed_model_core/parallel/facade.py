"""Lets megatron-core, which spells its device ``torch.cuda``, run on another device.

Two things are scoped as narrowly as Python allows. Six ``torch.cuda`` functions answer for the real device when the
caller is megatron and do what they always did for anyone else. And a torch-function mode, active only inside
``facade.active()``, rewrites ``device="cuda"`` literals and ``Tensor.cuda()`` in calls made from megatron. No file or
attribute of megatron-core is changed, and nothing is installed on CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_installed: torch.device | None = None


def install(device: torch.device) -> None:
    """Redirect megatron's ``torch.cuda`` calls to ``device``; must run before megatron.core is first imported."""
    global _installed
    if device.type == "cuda" or _installed == device:
        return
    if _installed is not None:
        raise RuntimeError(f"the megatron facade already points at {_installed}, not {device}")
    module = torch.get_device_module(device)
    cpu = device.type == "cpu"
    table: dict[str, Any] = {
        "current_device": lambda: device if cpu else module.current_device(),
        "synchronize": lambda *a: None if cpu else module.synchronize(*a),
        "manual_seed": torch.manual_seed if cpu else module.manual_seed,
        "get_rng_state": (lambda *a, **k: torch.get_rng_state()) if cpu else module.get_rng_state,
        "_lazy_call": lambda fn, **k: fn(),
        "current_stream": torch.cpu.current_stream if cpu else module.current_stream,
    }
    for name, serve in table.items():
        setattr(torch.cuda, name, _for_megatron(serve, getattr(torch.cuda, name)))
    _installed = device


def _for_megatron(serve: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return (serve if _called_by_megatron(2) else original)(*args, **kwargs)

    return call


def _called_by_megatron(depth: int) -> bool:
    return str(sys._getframe(depth).f_globals.get("__name__", "")).startswith("megatron.")


class _DeviceLiterals(TorchFunctionMode):
    """Rewrites ``device="cuda"`` in tensor factories, and ``Tensor.cuda()``, where megatron calls them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = kwargs.get("device")
        if named is not None and torch.device(named).type == "cuda" and _called_by_megatron(2):
            kwargs = {**kwargs, "device": self.device}
        if func is torch.Tensor.cuda and _called_by_megatron(2):
            return args[0].to(self.device)
        return func(*args, **kwargs)


@contextmanager
def active() -> Iterator[None]:
    """Rewrite megatron's device literals inside this block; nothing on CUDA."""
    if _installed is None:
        yield
        return
    with _DeviceLiterals(_installed):
        yield
