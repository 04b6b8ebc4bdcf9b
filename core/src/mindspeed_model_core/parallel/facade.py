"""Lets megatron-core, which spells its device ``torch.cuda``, run on another device.

Two things are scoped as narrowly as Python allows. Six ``torch.cuda`` functions answer for the real device when the
caller is megatron and do what they always did for anyone else. And a torch-function mode, active only inside
``facade.active()``, rewrites ``device="cuda"`` literals and ``Tensor.cuda()`` in calls made from megatron; so does
``new_group`` inside ``facade.group_options()``, for options of another backend than NCCL. No file or attribute of
megatron-core is changed, and nothing is installed on CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_device: torch.device | None = None
_wrapped = False


def install(device: torch.device) -> None:
    """Redirect megatron's ``torch.cuda`` calls to ``device``; must run before megatron.core is first imported."""
    global _device, _wrapped
    if device.type == "cuda":
        if _wrapped:
            raise RuntimeError(f"the megatron facade points at {_device}; it is not for CUDA")
        return
    _device = device
    if not _wrapped:
        for name, serve in _SERVED.items():
            setattr(torch.cuda, name, _for_megatron(serve, getattr(torch.cuda, name)))
        _wrapped = True


def _here() -> torch.device:
    assert _device is not None
    return _device


def _on(name: str, on_cpu: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls the device module's function of this name, or ``on_cpu`` where the CPU has none."""

    def serve(*args: Any, **kwargs: Any) -> Any:
        here = _here()
        return (on_cpu if here.type == "cpu" else getattr(torch.get_device_module(here), name))(*args, **kwargs)

    return serve


def _current_device() -> torch.device:
    here = _here()
    return here if here.type == "cpu" else torch.device(here.type, torch.get_device_module(here).current_device())


_SERVED: dict[str, Callable[..., Any]] = {
    "current_device": _current_device,
    "synchronize": _on("synchronize", lambda *_: None),
    "manual_seed": _on("manual_seed", torch.manual_seed),
    "get_rng_state": _on("get_rng_state", lambda *_, **__: torch.get_rng_state()),
    "_lazy_call": lambda function, **_: function(),
    "current_stream": _on("current_stream", torch.cpu.current_stream),
}
"""What answers instead of ``torch.cuda``; the device is looked up at each call."""


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
    if _device is None:
        yield
        return
    with _DeviceLiterals(_device):
        yield


@contextmanager
def group_options(options: Mapping[str, Any]) -> Iterator[None]:
    """Give process groups that megatron makes inside this block their backend's options, by its description of them.

    Its own way to pass options is NCCL's. Without any options nothing is redirected.
    """
    if not any(value is not None for value in options.values()):
        yield
        return
    original = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        found = options.get(str(kwargs.get("group_desc"))) if _called_by_megatron(2) else None
        return original(*args, **({**kwargs, "pg_options": found} if found is not None else kwargs))

    dist.new_group = new_group
    try:
        yield
    finally:
        dist.new_group = original
