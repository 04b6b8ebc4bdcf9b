"""Turns a whole network on meta into this process's part of it, in one order for all models."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .. import lora
from ..errors import UserError
from ..ops.table import raise_graph_limit
from ..recipe import Compile, ParallelConfig, Precision
from ..trunk import Trunk
from .context import ContextParallel, ContextShared
from .mesh import Mesh
from .placement import placements
from .shard import Gradients, Shard, collect
from .tensor import TensorParallel

BACKEND = "inductor"
"""What compiles networks."""
COMPUTE = {"bf16": torch.bfloat16, "bf16-pure": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
MASTER = {"bf16": torch.float32, "bf16-pure": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Parallel:
    """A network spread over the mesh: the module to run, its shards, and how its gradients are gathered."""

    def __init__(
        self, net: Trunk, mesh: Mesh, parallel: ParallelConfig, shards: dict[str, Shard], compute: torch.dtype
    ) -> None:
        self.net, self.mesh, self.config, self.shards, self.compute = net, mesh, parallel, shards, compute
        self.is_sharded = any(shard.sharded for shard in shards.values())
        self.gradients = Gradients(shards, mesh)

    @property
    def loss_scale(self) -> int:
        """Return what the loss is multiplied by because FSDP2 averages over replicas where a sum is wanted."""
        return self.mesh.replicas if self.is_sharded else 1

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Between micro-batches, keep what the ZeRO stage does not shard: weights (1, 2) and gradients (1)."""
        net: Any = self.net
        stage = self.config.shard
        if not self.is_sharded or stage == "zero3":
            yield
            return
        net.set_requires_gradient_sync(stage == "zero2")
        net.set_reshard_after_backward(False)
        yield
        net.set_requires_gradient_sync(True)
        net.set_reshard_after_backward(True)

    def sync_only_last(self, index: int, count: int) -> AbstractContextManager[None]:
        """Return ``no_sync`` for all but the last of ``count`` micro-batches."""
        return nullcontext() if index == count - 1 else self.no_sync()


def check(net: Trunk, parallel: ParallelConfig, world: int) -> None:
    """Raise UserError when the network cannot be cut this way; needs no process group."""
    if world % parallel.model:
        fits = [n for n in range(1, world + 1) if world % n == 0]
        raise UserError(f"{parallel.product} does not divide the {world} processes; products that do: {_list(fits)}")
    blocks = len(net.blocks)
    if blocks % parallel.pp:
        fits = [n for n in range(1, blocks + 1) if blocks % n == 0]
        raise UserError(f"parallel.pp={parallel.pp}: does not divide the {blocks} blocks; valid: {_list(fits)}")
    lora.check_stages(net, parallel.pp)
    lora.check_dropout(net, parallel.cp, parallel.sequence)
    shapes = {n: p.shape for n, p in net.named_parameters()}
    cuts = [
        (part // placement.unit, "heads" if placement.unit > 1 else "features", name)
        for name, placement in placements(net)
        if placement.dim is not None
        for part in placement.parts or (shapes[name][placement.dim],)
    ]
    wrong = [cut for cut in cuts if cut[0] % parallel.tp]
    if wrong:
        units, what, name = min(wrong, key=lambda cut: cut[1] != "heads")
        common = math.gcd(*(units for units, _, _ in cuts))
        fits = [n for n in range(1, common + 1) if common % n == 0]
        raise UserError(
            f"parallel.tp={parallel.tp}: does not divide the {units} {what} of {name}; valid: {_list(fits)}"
        )
    _check_context(net, parallel)


def _check_context(net: Trunk, parallel: ParallelConfig) -> None:
    if parallel.cp == 1:
        return
    heads = {module.heads for module in net.modules() if isinstance(module, ContextShared)}
    if not heads:
        raise UserError(f"parallel.cp={parallel.cp}: this network cannot share out its tokens; valid: 1")
    common = math.gcd(*heads) // parallel.tp
    if common % parallel.cp:
        fits = [n for n in range(1, common + 1) if common % n == 0]
        of = f" that each of tp={parallel.tp} ranks holds" if parallel.tp > 1 else ""
        raise UserError(
            f"parallel.cp={parallel.cp}: does not divide the {common} attention heads{of}; valid: {_list(fits)}"
        )


def _list(values: list[int]) -> str:
    shown = [str(v) for v in values[:12]]
    return ", ".join(shown) + (", ..." if len(values) > 12 else "")


def recomputed(wanted: str | int, held: int) -> int:
    """Return how many of a stage's ``held`` blocks run again in backward; UserError if there are not as many.

    What is still ``auto`` counts as none.
    """
    count = wanted if isinstance(wanted, int) else {"none": 0, "auto": 0, "all": held}[wanted]
    if count > held:
        raise UserError(f"recompute={count}: a pipeline stage holds {held} blocks; nearest: {held}, or all")
    return count


def parallelize(
    net: Trunk,
    mesh: Mesh,
    parallel: ParallelConfig,
    *,
    precision: Precision = "fp32",
    recompute: str | int = "none",
    recompute_keep: str = "nothing",
    compile: Compile = False,
) -> Parallel:
    """Cut a whole network on meta for this process and give it memory; values are still to be written.

    The order is: narrow (tensor parallel), share the context, keep the own stage (pipeline), recompute, compile, shard
    (ZeRO), materialise.
    """
    check(net, parallel, mesh.world)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    _narrow(net, mesh, parallel)
    _share_context(net, mesh)
    _keep_stage(net, mesh)
    net.recompute_keep = recompute_keep
    net.recompute = recomputed(recompute, len(net.blocks))
    if compile:
        _compile(net, mesh.device, compile)
    sharded = parallel.shard != "none" and bool(mesh.groups)
    compute, master = COMPUTE[precision], MASTER[precision]
    for parameter in net.parameters():
        # What is frozen is only computed with.
        parameter.data = parameter.data.to(master if sharded and parameter.requires_grad else compute)
    if sharded:
        _shard(net, mesh, parallel, compute, master)
    net.to_empty(device=mesh.device)
    return Parallel(net, mesh, parallel, collect(net, mesh, shapes, master_dtype=master), compute)


def _compile(net: Trunk, device: torch.device, what: Compile) -> None:
    """Compile each block, of which alike ones share their graphs, or the network whole."""
    if device.type == "npu":
        raise UserError("compile: networks are compiled for CUDA and CPU alone; set compile=false")
    if not net.compiles:
        raise UserError("compile: this network's blocks cannot be compiled; set compile=false")
    raise_graph_limit()
    net.compiled = True
    if what == "whole":
        net.graph = torch.compile(net.run, dynamic=None, backend=BACKEND)
        return
    for block in net.blocks.children():
        block.compile(dynamic=None, backend=BACKEND)


def _narrow(net: Trunk, mesh: Mesh, parallel: ParallelConfig) -> None:
    if mesh.tp == 1:
        return
    tp = TensorParallel(mesh.groups["tp"], mesh.tp_rank, mesh.tp, parallel.sequence, parallel.overlap_chunks)
    module: Any
    for module in net.modules():
        if not hasattr(module, "placements"):
            continue
        for name, placement in module.placements().items():
            parameter = getattr(module, name)
            if parameter is not None and placement.dim is not None:
                share = placement.narrow(parameter.detach(), mesh.tp_rank, mesh.tp)
                setattr(module, name, nn.Parameter(share.contiguous(), requires_grad=parameter.requires_grad))
        module.tp = tp
    net.sequence_ranks = mesh.tp if parallel.sequence else 1


def _share_context(net: Trunk, mesh: Mesh) -> None:
    if mesh.cp == 1:
        return
    net.cp = ContextParallel(mesh.groups["cp"], mesh.cp_rank, mesh.cp)
    for module in net.modules():
        if isinstance(module, ContextShared | lora.Adapter):
            module.cp = net.cp


def _keep_stage(net: Trunk, mesh: Mesh) -> None:
    if mesh.pp == 1:
        return
    per = len(net.blocks) // mesh.pp
    mine = range(mesh.pp_rank * per, (mesh.pp_rank + 1) * per)
    for name in [n for n, _ in net.blocks.named_children() if int(n) not in mine]:
        del net.blocks._modules[name]
    for name in absent(net, first=mesh.pp_rank == 0, last=mesh.is_last_stage):
        delattr(net, name)


def absent(net: Trunk, *, first: bool, last: bool) -> tuple[str, ...]:
    """Return the children beside the blocks that a pipeline stage does without."""
    tied = () if first or last else net.tied
    return (() if first else net.first) + (() if last else net.last) + tied


def _shard(net: Trunk, mesh: Mesh, parallel: ParallelConfig, compute: torch.dtype, master: torch.dtype) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    axis = DeviceMesh.from_group(mesh.groups["replicas"], mesh.device.type)
    reduced = torch.float32 if master == torch.bfloat16 else master
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduced, cast_forward_inputs=False)
    free = parallel.shard == "zero3"
    for block in net.blocks.children():
        fully_shard(block, mesh=axis, reshard_after_forward=free, mp_policy=policy)
    fully_shard(net, mesh=axis, reshard_after_forward=False, mp_policy=policy)


def initialise(parallel: Parallel, seed: int, of: Callable[[str], bool] = lambda name: True) -> None:
    """Give every parameter (``of`` these names) its random initial value; the same whole network under any layout."""
    device = parallel.mesh.device
    for name, shard in parallel.shards.items():
        if not of(name):
            continue
        whole = initial(parallel.net, name, tuple(shard.shape), seed, device)
        shard.write(shard.placement.narrow(whole, shard.tp_rank, shard.tp))


def initial(net: Trunk, name: str, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Return a whole parameter's random initial value in fp32, which follows from the seed and its name."""
    generator = torch.Generator(device).manual_seed(_seed(seed, name))
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    with torch.no_grad():
        (lora.initialise if lora.is_factor(name) else net.initialise)(name, whole, generator)
    return whole


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
