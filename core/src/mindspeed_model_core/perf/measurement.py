"""Measure how fast a recipe trains, and say on what: hardware, stack, commit."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .. import breakdown
from .. import device as devices
from ..breakdown import Breakdown, Clock
from ..errors import UserError
from ..model import Model
from ..peak import Peak, copy_rate, known_peak, measured_peak
from ..recipe import Recipe
from ..task import Work
from . import provenance


@dataclass(frozen=True)
class Ceilings:
    """What one device reached in the measuring process itself: FLOP/s of matrix products, bytes/s of copies.

    ``update_bytes`` are what clipping and the optimizer's update must read and write in a step, mean over the ranks.
    """

    products: float
    copies: float
    update_bytes: float


@dataclass(frozen=True)
class Measurement:
    """A measured speed with all that it needs to be believed; times in seconds, memory in bytes, rates per second.

    ``step_s`` is the median step, ``quartiles`` the first and third; ``flops`` are model FLOP/s per device.
    """

    model: str
    recipe: str
    reproduces: str | None
    digest: str
    precision: str
    device: str
    hardware: str
    devices: int
    stack: str
    commit: str | None
    date: str
    task_unit: str
    steps: int
    warmup: int
    step_s: float
    quartiles: tuple[float, float]
    samples_per_s: float
    units_per_s: float
    flops: float
    peak: Peak
    peak_bytes: int
    breakdown: Breakdown | None = None
    ceilings: Ceilings | None = None

    @property
    def mfu(self) -> float:
        """Model FLOPs over the device's peak, as a fraction; see ``peak.source`` for what the peak is."""
        return self.flops / self.peak.flops

    @property
    def spread(self) -> float:
        """The inter-quartile range of the step time over its median."""
        return (self.quartiles[1] - self.quartiles[0]) / self.step_s

    @property
    def unit(self) -> str:
        """The unit this task's speed is published in: samples/s and frames/s are global, tokens are per device."""
        return {"tokens": "tokens/s/device", "frames": "frames/s"}.get(self.task_unit, "samples/s")

    def value(self, unit: str | None = None) -> float | None:
        """Return the speed in a unit, by default the task's own; None where this task cannot be told in it."""
        values = {"samples/s": self.samples_per_s, "% MFU": 100 * self.mfu}
        if self.task_unit == "tokens":
            values["tokens/s/device"] = self.units_per_s / self.devices
        if self.task_unit == "frames":
            values["frames/s"] = self.units_per_s
        return values.get(unit or self.unit)


def measure(recipe: Recipe, model: Model, *, steps: int = 10, warmup: int = 3, session: Any = None) -> Measurement:
    """Train ``steps`` optimizer steps on synthetic data after ``warmup`` untimed ones, and return the median's speed.

    The device is synchronised only where the timed window begins and after a few steps behind it, whose phases are
    marked. One more is recorded by the profiler, and what the device can reach is measured. Every rank calls it and
    every rank gets the same result: a step takes as long as on its slowest rank. Weights are random, ``init_from`` is
    not read. An open ``session`` is measured as it is and left open.
    """
    if steps < 1 or warmup < 0:
        raise UserError(f"steps={steps}, warmup={warmup}: measure needs steps of 1 or more and warmup of 0 or more")
    if session is not None:
        return _measure(recipe, model, session, steps, warmup)
    from ..parallel import buffers
    from ..parallel.mesh import close_mesh, open_mesh
    from ..train import Session

    mesh = open_mesh(recipe.parallel, buffers=buffers.sizes(recipe, model))
    opened = Session(from_random(recipe), model, mesh, synthetic=True)
    opened.start()
    measured = _measure(recipe, model, opened, steps, warmup)
    # Not after an error: the other ranks may be anywhere, and leaving the group would wait for them.
    close_mesh(mesh)
    return measured


def from_random(recipe: Recipe) -> Recipe:
    """Return the recipe with no weights to read: all are random."""
    changes: dict[str, Any] = {"init_from": None}
    if recipe.lora is not None:
        changes["lora"] = recipe.lora.model_copy(update={"init_from": None})
    return recipe.model_copy(update=changes)


def _measure(recipe: Recipe, model: Model, session: Any, steps: int, warmup: int) -> Measurement:
    mesh, device = session.mesh, session.mesh.device
    for _ in range(warmup):
        session.step()
    devices.synchronize(device)
    mesh.barrier()
    devices.reset_peak_memory(device)
    clock, totals = Clock(device), []
    clock.mark()
    for _ in range(steps):
        totals.append(session.step())
        clock.mark()
    # Right behind the timed steps, so that a first step into an empty queue is not among them.
    marks, marked = Clock(device), min(steps, breakdown.STEPS)
    for _ in range(marked):
        session.step(marks.mark)
    marks.mark()
    devices.synchronize(device)
    *seconds, peak_bytes = _most(mesh, [*clock.seconds(), float(devices.peak_memory(device))])
    # The step's sums over all ranks: loss, samples, units, model FLOPs, ...
    work = [Work(round(samples), round(units), flops) for _, samples, units, flops, *_ in (t.read() for t in totals)]
    parts = breakdown.take(session, marks, marked)
    reached = measured_peak(device, recipe.precision)
    products, copies = _most(mesh, [reached.flops, copy_rate(device)])
    moved = statistics.mean(each[0] for each in mesh.gather([float(session.optimizer.moved)]))
    measured = result(
        recipe,
        model,
        device,
        work,
        seconds,
        unit=session.task.unit,
        world=mesh.world,
        warmup=warmup,
        peak=known_peak(devices.name(device), recipe.precision) or Peak(products, reached.source),
        peak_bytes=int(peak_bytes),
    )
    return replace(measured, breakdown=parts, ceilings=Ceilings(products, copies, moved))


def result(
    recipe: Recipe,
    model: Model,
    device: torch.device,
    work: Sequence[Work],
    seconds: Sequence[float],
    *,
    unit: str,
    world: int = 1,
    warmup: int,
    peak: Peak,
    peak_bytes: int,
    files: Sequence[Path] = (),
) -> Measurement:
    """Return what timed steps amount to: the work of each over all devices, and the seconds it took.

    ``files`` are sources outside the packages that decided what was measured; see ``commit``.
    """
    pairs = list(zip(work, seconds, strict=True))
    return Measurement(
        model=model.name,
        recipe=recipe.name,
        reproduces=recipe.reproduces,
        digest=recipe.digest(),
        precision=recipe.precision,
        device=device.type,
        hardware=devices.name(device),
        devices=world,
        stack=provenance.stack(),
        commit=provenance.commit(model.package, files=files),
        date=datetime.date.today().isoformat(),
        task_unit=unit,
        steps=len(pairs),
        warmup=warmup,
        step_s=statistics.median(seconds),
        quartiles=quartiles(seconds),
        samples_per_s=statistics.median(w.samples / s for w, s in pairs),
        units_per_s=statistics.median(w.units / s for w, s in pairs),
        flops=statistics.median(w.flops / s for w, s in pairs) / world,
        peak=peak,
        peak_bytes=peak_bytes,
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _most(mesh: Any, values: list[float]) -> list[float]:
    """Return each value's maximum over all ranks."""
    return [max(each) for each in zip(*mesh.gather(values), strict=True)]


def summary(measured: Measurement) -> Table:
    """Return a measurement as a table of two columns, for people."""
    from ..chart import plain, short

    m = measured
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    low, high = m.quartiles
    table.add_row("recipe", f"{m.model} {m.recipe} ({m.digest})")
    table.add_row("hardware", f"{m.devices} x {m.hardware}")
    table.add_row("stack", m.stack)
    table.add_row("commit", m.commit or "unknown")
    table.add_row("step", f"{m.step_s:.4g} s median of {m.steps}, quartiles {low:.4g} to {high:.4g} s")
    table.add_row("speed", f"{plain(m.value() or 0)} {m.unit}, {plain(m.samples_per_s)} samples/s in all")
    table.add_row("model FLOPs", f"{short(m.flops, 4, 'FLOP/s')} per device")
    table.add_row("MFU", f"{m.mfu:.1%} of {short(m.peak.flops, unit='FLOP/s')} ({m.peak.source})")
    table.add_row("peak memory", f"{m.peak_bytes / 2**30:.2f} GiB per device")
    if m.breakdown is not None:
        for row in breakdown.rows(m.breakdown):
            table.add_row(*row)
    if m.ceilings is not None:
        for row in _shares(m, m.ceilings):
            table.add_row(*row)
    return table


def _shares(m: Measurement, reached: Ceilings) -> Iterator[tuple[str, str]]:
    """Yield how much of what the device reaches here the step uses, and the phases made of it."""
    from ..chart import short

    products, copies = short(reached.products, unit="FLOP/s"), short(reached.copies, unit="B/s")
    yield "of products", f"{m.flops / reached.products:.1%} of the {products} that matrix products reach here"
    if m.breakdown is None:
        return
    if network := m.breakdown.seconds("forward", "backward"):
        yield "", f"{m.flops * m.step_s / network / reached.products:.1%} during forward and backward"
    if update := m.breakdown.seconds("optimizer"):
        share = reached.update_bytes / update / reached.copies
        yield "of copies", f"{share:.1%} of the {copies} that copies reach here, during optimizer"
