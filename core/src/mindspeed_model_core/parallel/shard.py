"""Every parameter as this process holds it: its share of the whole, its master copy and its gradient.

Optimizer, clipping, checkpoints, random initialisation and weight files all work on ``Shard``, so they cannot
disagree about where an element lives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from .mesh import Mesh
from .placement import Placement, placements

if TYPE_CHECKING:
    from ..trunk import Trunk

SUMMING = ("cuda", "npu")
"""Where layers also add up gradients of their weights' type: on a CPU a pass over them costs less than the calls."""


@dataclass
class Shard:
    """One parameter's share.

    ``shape`` is the whole parameter's; tensor parallelism cuts it by ``placement``; FSDP2 over the replicas then
    takes ``rows`` of dim 0 of that. If it is ``tied``, the first and the last pipeline stage hold it alike. ``master``
    is what the optimizer updates: the local tensor itself, or its fp32 copy where a trainable parameter computes in
    bf16. Of the processes that hold the same, one has it ``counted`` in sums over all, and one ``writes`` it into
    checkpoints: another one from parameter to parameter.
    """

    name: str
    parameter: nn.Parameter
    placement: Placement
    shape: torch.Size
    tp_rank: int
    tp: int
    rows: tuple[int, int]
    sharded: bool
    counted: bool
    writes: bool
    master: Tensor
    tied: bool = False
    buffer: Tensor | None = None

    @property
    def trainable(self) -> bool:
        """Whether the optimizer updates it; what it does not is frozen: no gradient, no master, in no checkpoint."""
        return self.parameter.requires_grad

    @property
    def local(self) -> Tensor:
        """Return the parameter's storage on this process."""
        return _local(self.parameter.detach())

    @property
    def gradient(self) -> Tensor | None:
        """Return the accumulated gradient of this share, in the master's dtype."""
        if self.buffer is not None:
            return self.buffer
        return None if self.parameter.grad is None else _local(self.parameter.grad)

    def take(self, tp_local: Tensor) -> Tensor:
        """Return this process's rows of a tensor already cut by tensor parallelism."""
        return tp_local.narrow(0, *self.rows) if self.sharded else tp_local

    def write(self, tp_local: Tensor) -> None:
        """Set master and parameter from a tensor already cut by tensor parallelism."""
        with torch.no_grad():
            self.master.copy_(self.take(tp_local))
            self.publish()

    def publish(self) -> None:
        """Copy the master into the parameter, where they are two."""
        if self.master.data_ptr() != self.local.data_ptr():
            self.local.copy_(self.master)

    def rectangles(self) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Yield (offset in the whole, slices of the local tensor) of each rectangle held here."""
        cut = self.placement.dim if self.tp > 1 else None
        size = self.shape[cut] if cut is not None else self.shape[0]
        pieces = self.placement.pieces(size, self.tp_rank, self.tp) if cut is not None else [(0, size)]
        start, count = self.rows
        at = 0
        for offset, length in pieces:
            where = [0] * len(self.shape)
            here = [slice(None)] * len(self.shape)
            if cut in (None, 0):
                low, high = max(at, start), min(at + length, start + count)
                if high > low:
                    where[0] = offset + low - at
                    here[0] = slice(low - start, high - start)
                    yield tuple(where), tuple(here)
            elif count:
                assert cut is not None
                where[0], where[cut] = start, offset
                here[cut] = slice(at, at + length)
                yield tuple(where), tuple(here)
            at += length


def _local(tensor: Tensor) -> Tensor:
    # FSDP2's tensors have it; naming their class would import seconds of code that one device never needs.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def collect(net: Trunk, mesh: Mesh, shapes: dict[str, torch.Size], *, master_dtype: torch.dtype) -> dict[str, Shard]:
    """Return every parameter's Shard by name; ``shapes`` are the whole shapes before anything was cut."""
    parameters = dict(net.named_parameters())
    out = {}
    for number, (name, placement) in enumerate(placements(net)):
        parameter = parameters[name]
        sharded = hasattr(parameter, "to_local")
        local = _local(parameter.detach())
        rows = (0, parameter.shape[0])
        if sharded:
            per = -(-parameter.shape[0] // mesh.replicas)
            rows = (min(mesh.replica_rank * per, parameter.shape[0]), local.shape[0])
        counted = (placement.dim is not None or mesh.tp_rank == 0) and (sharded or mesh.replica_rank == 0)
        alike_tp, alike = mesh.tp if placement.dim is None else 1, 1 if sharded else mesh.replicas
        index = mesh.replica_rank % alike * alike_tp + mesh.tp_rank % alike_tp
        writes = number % (alike_tp * alike) == index
        tied = mesh.pp > 1 and name.split(".")[0] in net.tied
        if tied and mesh.pp_rank > 0:
            counted = writes = False
        same = local.dtype == master_dtype or not parameter.requires_grad
        master = local if same else torch.empty_like(local, dtype=master_dtype)
        out[name] = Shard(
            name, parameter, placement, shapes[name], mesh.tp_rank, mesh.tp, rows, sharded, counted, writes, master,
            tied,
        )  # fmt: skip
    return out


class Gradients:
    """Accumulates and reduces gradients of parameters that data parallelism replicates, and of partial replicas.

    FSDP2 reduces what it shards. What is left is summed here: fp32 (the master's dtype) buffers laid out as one flat
    tensor, added to as each micro-batch's gradient becomes ready, and reduced once a step. Layers add the gradient of
    their weight themselves, in the product that makes it: without rounding it to the parameter's type where the buffer
    is wider, and without a pass to add it up.
    """

    def __init__(self, shards: dict[str, Shard], mesh: Mesh) -> None:
        self.shards, self.mesh = [s for s in shards.values() if s.trainable], mesh
        whole = [s for s in self.shards if not s.sharded]
        self.flat: dict[torch.dtype, Tensor] = {}
        self._sums: list[tuple[nn.Parameter, ops.Sum]] = []
        split = {s.name: s for s in whole if s.master.dtype != s.parameter.dtype}
        if mesh.replicas > 1 or split:
            self._lay_out(whole)
        for shard in whole:
            parameter, wider = shard.parameter, shard.name in split
            if not wider and (parameter.dim() < 2 or parameter.device.type not in SUMMING):
                continue
            total = ops.accumulate_gradient(parameter, shard.buffer)
            if wider:
                parameter.register_post_accumulate_grad_hook(_accumulate_into(shard))
            elif shard.buffer is None:
                # The first micro-batch's gradient is the sum to which the others are added.
                self._sums.append((parameter, total))
                parameter.register_post_accumulate_grad_hook(partial(_keep, total))

    def _lay_out(self, shards: list[Shard]) -> None:
        for dtype in {s.master.dtype for s in shards}:
            mine = [s for s in shards if s.master.dtype == dtype]
            flat = torch.zeros(sum(s.master.numel() for s in mine), dtype=dtype, device=self.mesh.device)
            self.flat[dtype] = flat
            for shard, part in zip(mine, flat.split([s.master.numel() for s in mine]), strict=True):
                shard.buffer = part.view(shard.master.shape)
                if shard.parameter.dtype == dtype:
                    shard.parameter.grad = shard.buffer

    def reduce(self) -> None:
        """Sum over the ranks that each saw a part: replicas along dp and cp, partial tensor-parallel ones, both ends.

        The ends are the first and the last pipeline stage, of what is tied.
        """
        if self.mesh.replicas > 1:
            for flat in self.flat.values():
                dist.all_reduce(flat, group=self.mesh.groups["replicas"])
        if self.mesh.tp > 1:
            self._sum([s for s in self.shards if s.placement.partial], "tp")
        self._sum([s for s in self.shards if s.tied], "ends")

    def _sum(self, shards: list[Shard], group: str) -> None:
        found = [s.gradient for s in shards if s.gradient is not None]
        if found:
            joined = torch.cat([g.reshape(-1) for g in found])
            dist.all_reduce(joined, group=self.mesh.groups[group])
            for gradient, part in zip(found, joined.split([g.numel() for g in found]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def clear(self) -> None:
        """Forget the step's gradients."""
        for flat in self.flat.values():
            flat.zero_()
        for shard in self.shards:
            if shard.buffer is None:
                shard.parameter.grad = None
        for _, total in self._sums:
            total.tensor = None

    @property
    def anew(self) -> bool:
        """Whether backward makes the first gradients of each step, rather than adding them to what is there."""
        return not self.flat

    @property
    def held(self) -> list[Tensor | None]:
        """Return the gradients that parameters have."""
        return [shard.parameter.grad for shard in self.shards]

    def hold(self, gradients: list[Tensor | None]) -> None:
        """Give parameters gradients that were ``held``, to which others are added."""
        for shard, gradient in zip(self.shards, gradients, strict=True):
            shard.parameter.grad = gradient
        for parameter, total in self._sums:
            total.tensor = parameter.grad


def _accumulate_into(shard: Shard) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert shard.buffer is not None
        if parameter.grad is not None:  # what a layer added itself, it does not hand on
            shard.buffer.add_(parameter.grad)
            parameter.grad = None

    return hook


def _keep(total: ops.Sum, parameter: Tensor) -> None:
    total.tensor = parameter.grad
