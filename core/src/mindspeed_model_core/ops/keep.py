"""What blocks that run again in backward keep of their first run: results of operators, told by name.

PyTorch's selective checkpoints look at every operator of a block from Python. Here only what is called by ``keeping``
is looked into: all else costs the host nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

P = ParamSpec("P")
R = TypeVar("R")


class _Tape(TorchDispatchMode):
    """Holds what operators of some names give the first time, and gives it back the second, in the same order."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names, self.again, self.active = names, False, False
        self.results: deque[Any] = deque()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() not in self.names:
            return func(*args, **(kwargs or {}))
        if self.again:
            return tree_map_only(_Held, _Held.given, self.results.popleft())
        made = func(*args, **(kwargs or {}))
        self.results.append(tree_map_only(Tensor, _Held, made))
        return made


class _Held:
    """A result, apart from the graph that it is in."""

    def __init__(self, tensor: Tensor) -> None:
        # Below autograd a tensor that is set apart would not share in the count of what is written over it.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self.tensor = tensor.detach()
        self.version = self.tensor._version

    def given(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError("what was kept of a block that runs again was overwritten since")
        return self.tensor.detach()


_tape: _Tape | None = None
"""The tape in force, of the process: backward, in which blocks run again, has threads of its own."""


def checkpointed(names: frozenset[str]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what a checkpoint runs a block in, and runs it again in, to keep the results of operators of these names.

    As ``torch.utils.checkpoint``'s ``context_fn``.
    """
    tape = _Tape(names)
    return _in_force(tape, again=False), _in_force(tape, again=True)


@contextmanager
def _in_force(tape: _Tape, *, again: bool) -> Iterator[None]:
    global _tape
    before, _tape, tape.again = _tape, tape, again
    try:
        yield
    finally:
        _tape = before


def keeping(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function, keeping results or giving back those of the first time where its block is run to that end."""
    tape = _tape
    if tape is None or tape.active:
        return function(*args, **kwargs)
    tape.active = True
    try:
        with tape:
            return function(*args, **kwargs)
    finally:
        tape.active = False


def keeps(names: frozenset[str]) -> bool:
    """Whether results of operators of these names are kept, and may not be written over."""
    return _tape is not None and names <= _tape.names
