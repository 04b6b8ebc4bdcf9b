"""Forward and backward of a micro-batch, recorded once for each kind of batch and replayed for the others.

A step of a large network is thousands of kernels, which the host queues one by one; what is recorded, a CUDA graph, it
queues by one call. Recorded are addresses: a batch is copied to where a recording reads it, and gradients lie where it
writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import suppress
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import device as devices
from .errors import UserError
from .parallel.apply import Parallel
from .trunk import Batch, Context

KINDS = 8
"""How many recordings there are: each takes seconds, and holds the batch that it reads."""
_MET = 1024
_PLAIN = (int, float, str, type(None), torch.Size, torch.dtype, torch.device)
"""What a batch may hold beside tensors: what is told apart by its value, which stays."""
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records what a function does on the device; returns what does it again, and where its result then lies."""


class Replays:
    """Runs micro-batches: the first of a kind as ever, later ones from a recording that is made of the second.

    A batch's kind are the shapes and types of its tensors and of its Context's, and all else that the two hold. Those
    that need the host meanwhile are run as ever, and so are more kinds than there are recordings for. ``loss`` maps the
    network's output and a batch to a scalar sum.
    """

    def __init__(
        self, parallel: Parallel, loss: Callable[[Tensor, Batch], Tensor], record: Record | None = None
    ) -> None:
        self.parallel, self.loss = parallel, loss
        self._record = record or graphs(parallel)
        self._met: set[Hashable] = set()
        self._recorded: dict[Hashable, _Recorded | None] = {}
        self._made: list[Tensor | None] | None = None
        """Where the first recording leaves the gradients that backward makes anew in each step; others add to them."""

    @property
    def recorded(self) -> list[Hashable]:
        """Return of what kinds of batches there are recordings."""
        return [key for key, recording in self._recorded.items() if recording is not None]

    def run(self, batch: Batch, count: Tensor, *, first: bool) -> Tensor:
        """Add the gradients of a micro-batch's part of a mean over ``count`` terms; return the sum of its losses.

        ``first`` says that it is the step's first, before which there are no gradients.
        """
        gradients, context = self.parallel.gradients, self.parallel.net.context(batch)
        leaves, spec = tree_flatten((batch, context))
        kind = _kind(leaves, spec, self.parallel.mesh.device)
        anew = first and gradients.anew
        if not self._has_met(kind):
            return self._run(batch, context, count)
        if anew and self._made is not None and (kind, True) not in self._recorded:
            # A recording that makes gradients anew has them in a place of its own: the others add to what is there.
            if not self._may((kind, False)):
                return self._run(batch, context, count)
            gradients.hold(self._made)
            torch._foreach_zero_([made for made in self._made if made is not None])
            anew = False
        recorded = self._recording((kind, anew), leaves, spec, count) if anew or self._in_place() else None
        if recorded is None:
            return self._run(batch, context, count)
        loss = recorded([leaf for leaf in leaves if isinstance(leaf, Tensor)], count)
        if anew:
            assert self._made is not None
            gradients.hold(self._made)
        return loss

    def _in_place(self) -> bool:
        """Whether gradients lie where recordings look for them."""
        gradients = self.parallel.gradients
        return not gradients.anew or (self._made is not None and all(map(is_, self._made, gradients.held)))

    def _has_met(self, kind: Hashable | None) -> bool:
        """Whether a batch of this kind was run as ever before: kernels are chosen, compiled and loaded then."""
        if kind is None or kind in self._met:
            return kind is not None
        if len(self._met) == _MET:
            self._met.clear()
        self._met.add(kind)
        return False

    def _may(self, key: Hashable) -> bool:
        return self._recorded[key] is not None if key in self._recorded else len(self._recorded) < KINDS

    def _run(self, batch: Batch, context: Context, count: Tensor) -> Tensor:
        value = self.loss(self.parallel.net(batch, context=context), batch)
        (value * self.parallel.loss_scale / count).backward()
        return value.detach()

    def _recording(self, key: tuple[Hashable, bool], leaves: list[Any], spec: Any, count: Tensor) -> _Recorded | None:
        if key in self._recorded or not self._may(key):
            return self._recorded.get(key)
        inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        batch, context = tree_unflatten(inputs, spec)
        terms, gradients = count.clone(), self.parallel.gradients
        held, made = gradients.held, None
        with suppress(devices.NeedsHost), devices.recording():
            again, loss = self._record(lambda: self._run(batch, context, terms))
            made = gradients.held
        # What is to add to gradients would write over those that were not there when it was recorded.
        if made is None or not (key[1] or all(map(is_, made, held))):
            gradients.hold(held)
            self._recorded[key] = None
            return None
        if key[1]:
            self._made = made
        found = _Recorded([leaf for leaf in inputs if isinstance(leaf, Tensor)], terms, again, loss)
        self._recorded[key] = found
        return found


class _Recorded:
    """A recording and what it reads."""

    def __init__(self, inputs: list[Tensor], count: Tensor, again: Callable[[], None], loss: Tensor) -> None:
        self.inputs, self.count, self.again, self.loss = inputs, count, again, loss

    def __call__(self, inputs: list[Tensor], count: Tensor) -> Tensor:
        torch._foreach_copy_([*self.inputs, self.count], [*inputs, count])
        self.again()
        return self.loss


def _kind(leaves: list[Any], spec: Any, device: torch.device) -> Hashable | None:
    """Return what batches must share to share a recording; None if it cannot be told."""
    if any(isinstance(leaf, Tensor) and leaf.device.type != device.type for leaf in leaves):
        return None
    if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        return None
    told = ((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return tuple(told), str(spec)


def graphs(parallel: Parallel) -> Record:
    """Return what records a process's work as CUDA graphs; UserError on a device that records none."""
    device = parallel.mesh.device
    if device.type != "cuda":
        raise UserError(f"cuda_graph=true: CUDA records graphs, and the device is {device.type}; set cuda_graph=false")
    stream, pool = torch.cuda.Stream(device), None

    def record(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        nonlocal pool
        # PyTorch takes no pool that lost all its graphs, as where none could be recorded, while a tensor is left in it.
        graph, place = torch.cuda.CUDAGraph(), pool or torch.cuda.graph_pool_handle()
        # Other threads, which load data or save, may ask for memory meanwhile.
        with torch.cuda.graph(graph, pool=place, stream=stream, capture_error_mode="thread_local"):
            loss = work()
        pool = place
        devices.set_aside(record, device, pool)
        return graph.replay, loss

    return record
