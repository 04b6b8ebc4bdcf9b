"""torch_npu's fused operators on the emulated NPU: its own checks, then documented rules, then a reference.

A call first runs torch_npu's C++ code, which checks the arguments and makes outputs of the right shapes and types while
the kernels beneath do nothing. Then come the rules that only the operator's documentation states, then a reference
computes from the published formula, in fp32. What has no reference raises, and so does an argument that the reference
does not know.
"""

from __future__ import annotations

import ctypes
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .aten import CALLS, Call, on_cpu, on_host

Function = Callable[..., Any]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


REFERENCES: dict[str, Function] = {}
RULES: dict[str, list[Function]] = {}
MEMORY = frozenset(
    "npu_format_cast npu_format_cast.Tensor npu_format_cast_ npu_format_cast_.acl_format npu_change_data_ptr "
    "get_npu_format copy_memory_ get_storage_size".split()
)
"""Operators that need memory and copies alone: torch_npu's code runs."""
BESIDE = frozenset("_npu_format_cast _npu_format_cast.aclnn _npu_format_cast.input_dtype".split())
"""Operators whose own code needs more of the runtime than there is: only the reference runs."""

SILENT = frozenset("inner_precise gen_mask_parallel sync softmax_in seed offset numels".split())
"""Arguments that change no value: how attention is computed, and what its dropout drew, which has no reference."""

_state: dict[str, Any] = {}


class RefusedCall(RuntimeError):
    """A call that breaks a rule of the operator's documentation."""


def require(holds: bool, rule: str) -> None:
    """Raise RefusedCall unless the rule holds."""
    if not holds:
        raise RefusedCall(f"breaks a rule of its documentation: {rule}")


def reference(*names: str) -> Callable[[Function], Function]:
    """Register a function of the operator's arguments, by their names, on CPU tensors as its numerics."""

    def register(function: Function) -> Function:
        REFERENCES.update(dict.fromkeys(names, function))
        return function

    return register


def rule(*names: str) -> Callable[[Function], Function]:
    """Register a check of the operator's arguments, on CPU tensors, before it is computed."""

    def register(function: Function) -> Function:
        for name in names:
            RULES.setdefault(name, []).append(function)
        return function

    return register


def install(checking: ctypes.c_int) -> None:
    """Put references, and refusals where there is none, in place of every npu operator's kernel. Once per process."""
    library = torch.library.Library("npu", "IMPL")
    _state.update(library=library, checking=checking)
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        name = full.removeprefix("npu::")
        if name == full or name in MEMORY or not torch._C._dispatch_has_kernel_for_dispatch_key(full, "PrivateUse1"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced is the point
            if name in REFERENCES:
                library.impl(name, _Kernel(name), "PrivateUse1", with_keyset=True)
            else:
                library.impl(name, _refusal(name), "PrivateUse1")


def _refusal(name: str) -> Function:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"npu::{name} has no reference in the NPU emulator")

    return refuse


@contextmanager
def _only_checks() -> Iterator[None]:
    _state["checking"].value += 1
    try:
        yield
    finally:
        _state["checking"].value -= 1


class _Kernel:
    """What an operator with a reference does."""

    def __init__(self, name: str) -> None:
        base, _, overload = name.partition(".")
        op = getattr(getattr(torch.ops.npu, base), overload or "default")
        self.name, self.reference = name, REFERENCES[name]
        self.arguments = list(op._schema.arguments)
        self.known = {p.name for p in inspect.signature(self.reference).parameters.values()}
        unknown = self.known - {a.name for a in self.arguments}
        assert not unknown, f"the reference of npu::{name} has parameters that the operator lacks: {sorted(unknown)}"
        self.own = None if name in BESIDE else torch.library.get_kernel(op, "PrivateUse1")
        self.differentiates = torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "AutogradPrivateUse1")

    def __call__(self, keys: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip((a.name for a in self.arguments), args, strict=False)), **kwargs}
        for argument in self.arguments:
            if argument.name not in given and argument.has_default_value():
                given[argument.name] = argument.default_value
        positional = [given[a.name] for a in self.arguments if not a.kwarg_only]
        named = {a.name: given[a.name] for a in self.arguments if a.kwarg_only}
        out = None
        if self.own is not None:
            with _only_checks():
                out = self.own.call_boxed(keys, *positional, **named)
        if not self.differentiates and torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(given)):
            raise RuntimeError(
                f"npu::{self.name} has no derivative in torch_npu: an operand requires grad, its gradient would be lost"
            )
        for argument in self.arguments:
            value = given[argument.name]
            if argument.name not in self.known | SILENT and _set(value, argument):
                raise NotImplementedError(
                    f"npu::{self.name}: the NPU emulator's reference does not know {argument.name}={_shown(value)}"
                )
        try:
            for check in RULES.get(self.name, ()):
                on_cpu(check, (), given)
        except RefusedCall as error:
            raise RefusedCall(f"npu::{self.name}: {error}") from None
        CALLS.append(Call(self.name, tuple(tuple(t.shape) for t in _tensors(given))))
        found = on_cpu(self.reference, (), {key: value for key, value in given.items() if key in self.known})
        return found if out is None else self._filled(out, found)

    def _filled(self, out: Any, found: Any) -> Any:
        """Return torch_npu's outputs with the reference's values; what it gives None for stays as it is."""
        pairs = list(zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (out, found)), strict=True))
        for number, (ours, theirs) in enumerate(pairs):
            if not isinstance(ours, Tensor) or theirs is None or ours is theirs:
                continue
            if ours.shape != theirs.shape or ours.is_floating_point() != theirs.is_floating_point():
                raise AssertionError(
                    f"npu::{self.name} output {number}: torch_npu makes {ours.dtype} {tuple(ours.shape)}, "
                    f"the reference {theirs.dtype} {tuple(theirs.shape)}"
                )
            on_host(ours).copy_(on_host(theirs))
        return out


def _tensors(given: Mapping[str, Any]) -> Iterable[Tensor]:
    for value in given.values():
        yield from (x for x in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(x, Tensor))


def _set(value: Any, argument: Any) -> bool:
    """Whether an argument is given and is not its default."""
    default = argument.default_value if argument.has_default_value() else None
    if isinstance(value, Tensor) or isinstance(default, Tensor):
        return value is not None
    return value is not None and value != default and value != []


def _shown(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
