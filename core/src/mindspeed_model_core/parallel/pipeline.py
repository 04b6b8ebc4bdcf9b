"""Runs the micro-batches of one step, forward and backward, on one stage or through the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..breakdown import Mark, unmarked
from ..replay import Replays
from ..trunk import Batch, State
from . import engine
from .apply import Parallel


def run(
    parallel: Parallel,
    batches: list[Batch],
    loss: Callable[[Tensor, Batch], Tensor],
    count: Tensor,
    mark: Mark = unmarked,
    replays: Replays | None = None,
) -> Tensor:
    """Accumulate the gradients of ``sum of losses / count`` over ``batches``; return the local sum of losses.

    ``loss`` maps the network's output and a batch to a scalar sum. On all but the last stage the result is 0. ``mark``
    is told where forward, backward and, among stages, pipeline begin. ``replays`` run micro-batches, if given: both in
    one, which is marked as forward.
    """
    net, mesh = parallel.net, parallel.mesh
    wide = torch.float64 if parallel.compute == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide, device=mesh.device)

    def scaled(output: Tensor, batch: Batch) -> Tensor:
        value = loss(output, batch)
        total.add_(value.detach())
        return value * parallel.loss_scale / count

    def alone(batch: Batch) -> None:
        mark("forward")
        value = scaled(net(batch), batch)
        mark("backward")
        value.backward()

    if replays is not None:
        for index, batch in enumerate(batches):
            mark("forward")
            total.add_(replays.run(batch, count, first=index == 0))
        return total

    if mesh.pp == 1:
        for index, batch in enumerate(batches):
            with parallel.sync_only_last(index, len(batches)):
                alone(batch)
        return total

    def step(batch: Batch, received: Tensor | None) -> Tensor:
        out = net(batch, None if received is None else unpack(received, net.shapes(batch)))
        return scaled(out, batch) if mesh.is_last_stage else pack(out, parallel.compute)

    shapes = [packed_shape(net.shapes(batch)) for batch in batches]
    engine.one_f_one_b(
        step, batches, last=mesh.is_last_stage, shapes=shapes, dtype=parallel.compute, pp=mesh.pp,
        no_sync=parallel.no_sync, mark=mark,
    )  # fmt: skip
    return total


def packed_shape(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return the (rows, width) of a State packed for its way to the next stage."""
    widths = {shape[-1] for shape in shapes.values()}
    if len(widths) != 1:
        raise ValueError(f"a State that crosses stages needs one width, got {shapes}")
    rows = sum(torch.Size(shape[:-1]).numel() for shape in shapes.values())
    return rows, widths.pop()


def pack(state: State, dtype: torch.dtype) -> Tensor:
    """Join a State's tensors along their rows, in the one dtype that crosses stages."""
    rows = [tensor.flatten(0, -2).to(dtype) for tensor in state.values()]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def unpack(packed: Tensor, shapes: dict[str, Any]) -> State:
    """Cut a packed State back into its named tensors."""
    sizes = [torch.Size(shape[:-1]).numel() for shape in shapes.values()]
    parts = packed.split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
