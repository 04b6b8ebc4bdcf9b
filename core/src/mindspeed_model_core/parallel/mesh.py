"""The axes processes are arranged along: tp fastest, then cp, then dp, then pp."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from .. import device as devices
from ..errors import UserError
from ..recipe import ParallelConfig
from . import engine


@dataclass(frozen=True)
class Mesh:
    """This process's place: sizes, ranks and groups along tp, cp, pp and dp; all sizes are 1 without a process group.

    The ``replicas`` of a weight are the ranks along dp and cp: they see other data, or other tokens of the same.
    """

    device: torch.device
    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    tp_rank: int = 0
    cp_rank: int = 0
    pp_rank: int = 0
    dp_rank: int = 0
    groups: dict[str, Any] = field(default_factory=dict)
    host_group: Any = None

    @property
    def world(self) -> int:
        """Return the number of processes."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def replicas(self) -> int:
        """Return how many ranks hold each weight alike: dp x cp."""
        return self.dp * self.cp

    @property
    def replica_rank(self) -> int:
        """Return this process's rank among the replicas."""
        return self.dp_rank * self.cp + self.cp_rank

    @property
    def model(self) -> int:
        """Return how many ranks share a batch: tp x cp x pp."""
        return self.tp * self.cp * self.pp

    @property
    def draws(self) -> bool:
        """Whether this process speaks for its data rank about the data: tp, cp and pp ranks see the same batch."""
        return self.tp_rank == self.cp_rank == self.pp_rank == 0

    @property
    def reports(self) -> bool:
        """Whether this process speaks for its data rank about the loss: the first of those with the last stage."""
        return self.is_last_stage and self.tp_rank == self.cp_rank == 0

    @property
    def rank(self) -> int:
        """Return this process's global rank."""
        return dist.get_rank() if self.groups else 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the last pipeline stage."""
        return self.pp_rank == self.pp - 1

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's plain Python value, in rank order."""
        if not self.groups:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=self.host_group)
        return out

    def barrier(self) -> None:
        """Wait for all processes, on the host."""
        if self.groups:
            dist.barrier(group=self.host_group)


def launched() -> bool:
    """Whether torchrun (or the like) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def open_mesh(
    parallel: ParallelConfig, device: torch.device | None = None, *, buffers: Mapping[str, int] | None = None
) -> Mesh:
    """Join the process group named by torchrun's environment, if any, and arrange it as the recipe says.

    ``buffers`` are the MB of a group's communication buffers by its name, where the device has such a setting.
    """
    device = device or devices.pick()
    if launched() and not dist.is_initialized():
        dist.init_process_group(devices.backend(device), timeout=datetime.timedelta(minutes=30))
    if not dist.is_initialized():
        if parallel.model > 1:
            raise UserError(
                f"{parallel.product} processes are needed, there is 1; start with --nproc {parallel.model} or a "
                "multiple"
            )
        return Mesh(device)
    world, model = dist.get_world_size(), parallel.model
    if world % model:
        raise UserError(f"{parallel.product} does not divide the {world} processes; start a multiple of {model}")
    options = {name: devices.group_options(device, size) for name, size in (buffers or {}).items()}
    engine.initialise(parallel.tp, parallel.cp, parallel.pp, device, options)
    groups = engine.groups()
    host = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=2))
    return Mesh(
        device,
        tp=parallel.tp,
        cp=parallel.cp,
        pp=parallel.pp,
        dp=world // model,
        tp_rank=groups["tp"].rank(),
        cp_rank=groups["cp"].rank(),
        pp_rank=groups["pp"].rank(),
        dp_rank=groups["dp"].rank(),
        groups=groups,
        host_group=host,
    )


def close_mesh(mesh: Mesh) -> None:
    """Leave the process group."""
    if mesh.groups:
        engine.finalise()
        dist.destroy_process_group()
