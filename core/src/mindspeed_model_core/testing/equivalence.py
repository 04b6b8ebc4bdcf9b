"""Trains a network for a few steps under a layout and returns everything that must not depend on the layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim import AdamW
from ..parallel import apply, pipeline
from ..parallel.mesh import open_mesh
from ..parallel.shard import Shard
from ..recipe import Compile, OptimConfig, ParallelConfig, Precision
from ..task import Task
from ..trunk import Batch, Trunk
from .dist import run_dist
from .tolerance import assert_close

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}),
    "tp4": (4, {"tp": 4}),
    "tp2-sequence": (2, {"tp": 2, "sequence": True}),
    "tp2-sequence-chunks": (2, {"tp": 2, "sequence": True, "overlap_chunks": 2}),
    "pp2": (2, {"pp": 2}),
    "pp4": (4, {"pp": 4}),
    "dp2": (2, {}),
    "dp2-zero1": (2, {"shard": "zero1"}),
    "dp2-zero2": (2, {"shard": "zero2"}),
    "dp2-zero3": (2, {"shard": "zero3"}),
    "tp2-sequence-pp2-dp2-zero3": (8, {"tp": 2, "sequence": True, "pp": 2, "shard": "zero3"}),
    "tp2-pp2-dp2-zero1": (8, {"tp": 2, "pp": 2, "shard": "zero1"}),
}


@dataclass(frozen=True)
class Job:
    """What is trained: ``batches(step)`` are the micro-batches of one optimizer step, over all data ranks."""

    build: Callable[[], Trunk]
    task: Task
    batches: Callable[[int], list[Batch]]
    steps: int = 4
    precision: Precision = "fp64"
    recompute: str | int = "none"
    recompute_keep: str = "nothing"
    compile: Compile = False


def _random(name: str, weight: Tensor, generator: torch.Generator) -> None:
    """Fill a parameter with values far from any special one: what starts at zero would hide all behind it."""
    weight.normal_(0, 1, generator=generator)
    if weight.dim() == 1:
        weight.mul_(0.3).add_(0 if name.endswith("bias") else 1)
    else:
        weight.mul_(weight[0].numel() ** -0.5)


Pieces = dict[str, list[tuple[tuple[int, ...], Tensor]]]


@dataclass
class Trace:
    """Loss and gradient norm of each step, the first step's gradients and the last parameters, as held here."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: Pieces = field(default_factory=dict)
    parameters: Pieces = field(default_factory=dict)


def trace(job: Job, layout: dict[str, Any]) -> Trace:
    """Train in this process (one of several, if a process group is up) and return what it holds."""
    config = ParallelConfig(**layout)
    mesh = open_mesh(config, torch.device("cpu"))
    with torch.device("meta"):
        net = job.build()
    parallel = apply.parallelize(
        net,
        mesh,
        config,
        precision=job.precision,
        recompute=job.recompute,
        recompute_keep=job.recompute_keep,
        compile=job.compile,
    )
    net.initialise = _random  # type: ignore[method-assign]
    apply.initialise(parallel, seed=7)
    optimizer = AdamW(parallel, OptimConfig(lr=1e-2, clip=0.5))
    out = Trace()
    for step in range(job.steps):
        batches = job.batches(step)[mesh.dp_rank :: mesh.dp]
        count = torch.tensor(float(sum(job.task.count(b) for b in batches)))
        if mesh.groups:
            dist.all_reduce(count, group=mesh.groups["dp"])
        loss = pipeline.run(parallel, batches, job.task.loss, count)
        if not mesh.reports:
            loss = loss * 0
        if mesh.groups:
            dist.all_reduce(loss)
        parallel.gradients.reduce()
        if step == 0:
            learning = {name: s for name, s in parallel.shards.items() if s.trainable}
            out.gradients = _pieces(learning, lambda s: s.gradient)
        out.norms.append(float(optimizer.step(1e-2)))
        parallel.gradients.clear()
        out.losses.append(float(loss / count))
    if job.compile:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    out.parameters = _pieces(parallel.shards, lambda s: s.master)
    return out


def _pieces(shards: dict[str, Shard], of: Callable[[Shard], Tensor | None]) -> Pieces:
    out: Pieces = {}
    for name, shard in shards.items():
        tensor = of(shard)
        assert tensor is not None, f"{name} has no gradient"
        out[name] = [(at, tensor[here].detach().clone()) for at, here in shard.rectangles()]
    return out


def whole(parts: list[Pieces], like: Pieces) -> dict[str, Tensor]:
    """Join what all ranks hold; where ranks disagree the furthest one stays, nan furthest of all.

    AssertionError when nobody holds an element.
    """
    out = {name: torch.empty_like(pieces[0][1]) for name, pieces in like.items()}
    held = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in out.items()}
    for part in parts:
        for name, pieces in part.items():
            want = like[name][0][1]
            for at, value in pieces:
                here = tuple(slice(a, a + n) for a, n in zip(at, value.shape, strict=True))
                old = out[name][here]
                worse = ~held[name][here] | (_far(value, want[here]) > _far(old, want[here]))
                out[name][here] = torch.where(worse, value, old)
                held[name][here] = True
    for name, mask in held.items():
        assert bool(mask.all()), f"{name}: nobody holds {int((~mask).sum())} of its {mask.numel()} elements"
    return out


def _far(value: Tensor, want: Tensor) -> Tensor:
    return (value - want).abs().nan_to_num(nan=float("inf"))


def _assert_finite(got: Trace, who: str) -> None:
    """Fail where a value is nan or infinite: comparisons with nan are false, and its maximum depends on the order."""
    for what in ("losses", "norms"):
        values = torch.tensor(getattr(got, what))
        assert bool(values.isfinite().all()), f"{who}: {what} are not finite: {values.tolist()}"
    for what in ("gradients", "parameters"):
        for name, pieces in getattr(got, what).items():
            assert all(bool(p.isfinite().all()) for _, p in pieces), f"{who}: {what} of {name} are not finite"


def assert_equivalent(
    job: Job, world: int, layout: dict[str, Any], tolerance: float, *, parameters: bool = True
) -> None:
    """Fail unless ``world`` processes under ``layout`` train as one does, not compiled: losses, gradients, parameters.

    Without ``parameters`` they are left out: where gradients are rough, Adam turns a small one into a full step.
    """
    alone = trace(replace(job, compile=False), {})
    _assert_finite(alone, "one process")
    spread = run_dist(trace, world, job, layout)
    for rank, got in enumerate(spread):
        _assert_finite(got, f"rank {rank}")
        for what in ("losses", "norms"):
            pairs = zip(getattr(got, what), getattr(alone, what), strict=True)
            worst = max(abs(a - b) / abs(b) for a, b in pairs)
            assert worst <= tolerance, f"rank {rank}: {what} differ by {worst:.2e} (allowed {tolerance:.0e})"
    for what in ("gradients", "parameters") if parameters else ("gradients",):
        want = getattr(alone, what)
        got = whole([getattr(t, what) for t in spread], want)
        assert_close(got, {name: pieces[0][1] for name, pieces in want.items()}, tolerance)
