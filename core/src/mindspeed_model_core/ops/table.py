"""The table of ops: each has a reference formula and, on some devices, a function that serves it better.

An op is called like its reference; the first tensor's device picks what serves it. The optimization level says how far
to go: 0 the reference, 1 fused ops, 2 also those that overlap communication with computation.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import UserError, nearest
from .keep import keeping

P = ParamSpec("P")
R = TypeVar("R")
VARIABLE = "MINDSPEED_MODEL_OPS"
"""Set to ``reference``, it keeps a whole process at level 0, whatever its recipe says."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""The types that kernels of accelerators take."""
TABLE: dict[str, Op[Any, Any]] = {}
"""Every op by its name."""
_level = 2
_reference: bool | None = None


@dataclass(frozen=True)
class Entry:
    """What serves an op on a kind of device.

    ``calls`` are the library functions it is made of, ``when`` says in words for which operands, and ``takes`` decides
    it from the op's arguments. ``level`` is the optimization level from which it is used.
    """

    function: Callable[..., Any]
    calls: tuple[str, ...]
    when: str
    takes: Callable[..., bool]
    level: int

    @property
    def by(self) -> str:
        """Return the names of what serves, for tables."""
        return " ".join(self.calls) or "PyTorch, in parts"


class Op(Generic[P, R]):
    """A function with one signature on every device; made by ``op`` from its reference."""

    def __init__(self, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.kept = False  # whether results of operators in it can be kept for when its block runs again
        self.reference = reference
        self.entries: dict[str, list[Entry]] = {}
        TABLE[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute with what serves these operands on their device."""
        entry = self.serving(_kind(args[0]), *args, **kwargs)
        function = self.reference if entry is None else entry.function
        return keeping(function, *args, **kwargs) if self.kept else function(*args, **kwargs)

    def serving(self, kind: str, *args: Any, **kwargs: Any) -> Entry | None:
        """Return the entry that serves these arguments on a kind of device; None: the reference."""
        wanted = level()
        for entry in self.entries.get(kind, ()):
            if entry.level <= wanted and entry.takes(*args, **kwargs):
                return entry
        return None

    def on(
        self,
        kind: str,
        calls: str,
        *,
        when: str = "all",
        takes: Callable[..., bool] = lambda *_, **__: True,
        level: int = 1,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register a function for a kind of device, made of these library ``calls`` (names with spaces between).

        Entries are tried in the order in which they are registered.
        """

        def register(function: Callable[P, R]) -> Callable[P, R]:
            self.entries.setdefault(kind, []).append(Entry(function, tuple(calls.split()), when, takes, level))
            return function

        return register

    def compiled_on(self, kind: str) -> None:
        """Serve the op on a kind of device by its reference, compiled into one kernel for forward and backward each."""

        self.on(kind, "torch.compile")(compiled(self.reference))


def op(reference: Callable[P, R]) -> Op[P, R]:
    """Enter a function into the table, as the reference of the op of its name."""
    return Op(reference)


def level() -> int:
    """Return the optimization level in force."""
    return 0 if _forced() else _level


@contextmanager
def at_level(wanted: int) -> Iterator[None]:
    """Use an optimization level inside the context.

    It holds for the process, not for the thread: backward, in which blocks are computed again, has threads of its own.
    """
    global _level
    before, _level = _level, wanted
    try:
        yield
    finally:
        _level = before


def _forced() -> bool:
    # Kept by hand: the compiler warns of functools' caches.
    global _reference
    if _reference is None:
        value = os.environ.get(VARIABLE, "")
        if value not in ("", "reference"):
            raise UserError(f"{VARIABLE}={value!r}: is reference, or not set{nearest(value, ['reference'])}")
        _reference = value == "reference"
    return _reference


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that is compiled when it is first called, for each type and width that its tensors have.

    The last size of a tensor of several is its width: a reduction over a size that is left open is slow. Other sizes
    are open once they change.
    """

    @functools.cache
    def made() -> Callable[P, R]:
        raise_graph_limit()
        return torch.compile(function, dynamic=None)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # a part of something larger
            return function(*args, **kwargs)
        call = made()
        for operand in (*args, *kwargs.values()):
            if isinstance(operand, Tensor) and operand.dim() > 1:
                torch._dynamo.mark_static(operand, operand.dim() - 1)
        return call(*args, **kwargs)

    return called


@functools.cache
def has_triton() -> bool:
    """Whether Triton is here, as it is wherever PyTorch was built for CUDA on Linux."""
    return find_spec("triton") is not None


def eager_triton(*operands: Tensor) -> bool:
    """Whether Triton kernels take these operands: of one type that they know, and not in a graph, which fuses more."""
    if torch.compiler.is_compiling():
        return False
    return operands[0].dtype in FLOATS and all(x.dtype == operands[0].dtype for x in operands) and has_triton()


def raise_graph_limit() -> None:
    """Let a function have 64 graphs instead of PyTorch's 8, beyond which it would not be compiled any more."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


def _kind(operand: Any) -> str:
    first = operand if isinstance(operand, Tensor) else operand[0]
    return str(first.device.type)
