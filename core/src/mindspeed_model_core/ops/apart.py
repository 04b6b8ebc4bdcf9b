"""What one projection makes side by side, and its gradient, which is not put together where it lies side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .table import op


@op
def apart(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return ``count`` equal parts of ``[..., width]`` along the last dim, which are not to be written to."""
    return x.chunk(count, -1)


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, ...]:
        return tuple(x.chunk(count, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = joined(grads)
        return torch.cat(grads, -1) if whole is None else whole, None


@apart.on("cuda", "chunk", when="not in a graph", takes=lambda x, count: not torch.compiler.is_compiling())
def _apart(x: Tensor, count: int) -> tuple[Tensor, ...]:
    return _Apart.apply(x, count)  # type: ignore[no-any-return]


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Return what these are the parts of along the last dim, one right after the other; None if they are of nothing."""
    first, width = parts[0], 0
    for part in parts:
        if (
            part.dtype != first.dtype
            or part.stride() != first.stride()
            or part.shape[:-1] != first.shape[:-1]
            or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or part.storage_offset() != first.storage_offset() + width
        ):
            return None
        width += part.shape[-1]
    rows = [stride for size, stride in zip(first.shape[:-1], first.stride(), strict=False) if size > 1]
    if first.stride(-1) != 1 or any(stride < width for stride in rows):  # what follows would be the next row's
        return None
    return first.as_strided((*first.shape[:-1], width), first.stride())


def empty_like_parts(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return uninitialised tensors of the shapes of ``[..., heads, width]``; the last few side by side as parts are."""
    width = parts[-1].shape[-1]
    flat = [part.flatten(-2) if part.stride(-2) == part.shape[-1] == width else None for part in parts]
    for first in range(len(parts) - 1):
        beside = flat[first:]
        if any(part is None for part in beside) or joined(beside) is None:  # type: ignore[arg-type]
            continue
        heads = [part.shape[-2] for part in parts[first:]]
        room = parts[first].new_empty(*parts[first].shape[:-2], sum(heads), width)
        return [*(part.new_empty(part.shape) for part in parts[:first]), *room.split(heads, -2)]
    return [part.new_empty(part.shape) for part in parts]
