"""Where a training step's time goes: by phases marked in the device's queue, and by what the device ran meanwhile."""

from __future__ import annotations

import csv
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from . import device as devices

Mark = Callable[[str], None]
"""Says that what follows belongs to the named phase; it waits for nothing and changes nothing."""
Span = tuple[float, float]
STEPS = 3
"""Steps that are marked, unless fewer were timed."""
PHASES = ("data", "encode", "forward", "backward", "pipeline", "reduction", "optimizer")
"""In the order of a step. ``forward`` is backward too where steps are replayed, ``pipeline`` what a stage sends,
receives and waits for, ``reduction`` the sums of gradients beside FSDP2's, ``optimizer`` clipping too; what a
collective within a phase takes is that phase's."""
_WINDOW = "mindspeed: recorded step"
COLUMNS = ("Computing", "Communication(Not Overlapped)", "Communication", "Free")
"""Of torch_npu's table of a step, in microseconds; its first, second and last add up to the step."""


def unmarked(phase: str) -> None:
    """Be the mark of a step that nobody takes apart."""


class Clock:
    """Marks in time: events in the device's queue, so that marking never waits; on CPU the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._marks: list[Any] = []

    def mark(self, name: str = "") -> None:
        """Begin a span of this name where the device's queue ends now."""
        self._names.append(name)
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
            return
        event = devices.module(self._device).Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Return the time from each mark to the next; the device must be synchronised."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cpu":
            return [b - a for a, b in pairs]
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]

    def phases(self) -> dict[str, float]:
        """Return the time spent under each name, of which the last mark's only ends the one before."""
        out: dict[str, float] = {}
        for name, seconds in zip(self._names, self.seconds(), strict=False):
            out[name] = out.get(name, 0.0) + seconds
        return out


@dataclass(frozen=True)
class Phase:
    """A part of the step, in seconds: its mean over the marked steps and all ranks, and the slowest rank's mean."""

    name: str
    seconds: float
    slowest: float


@dataclass(frozen=True)
class Activity:
    """What ran in one recorded step, in seconds; None is what cannot be told.

    A device's step lasts from the first kernel's start to the last one's end. ``communication`` lasts as long as a
    collective or transfer is under way, waiting for other ranks included; ``exposed`` is the part of it beside which
    nothing computes, and ``idle`` is when nothing runs.
    """

    step_s: float
    communication: float
    exposed: float | None = None
    idle: float | None = None


@dataclass(frozen=True)
class Breakdown:
    """The mean over ranks of ``steps`` marked steps by phases, which add up to it, and of one step that was recorded.

    ``recorded`` is None where nothing could be.
    """

    device: str
    ranks: int
    steps: int
    phases: tuple[Phase, ...]
    recorded: Activity | None

    @property
    def step_s(self) -> float:
        """The marked step."""
        return self.seconds(*PHASES)

    def seconds(self, *names: str) -> float:
        """Return the time of these phases together."""
        return sum(phase.seconds for phase in self.phases if phase.name in names)


_UNKNOWN = (None,) * len(fields(Activity))


def take(session: Any, clock: Clock, steps: int) -> Breakdown:
    """Break down the ``steps`` steps that ``clock`` marked, and record one more; every rank calls it alike."""
    mesh = session.mesh
    told = clock.phases()
    # One process on a CPU has no communication, and what is idle there is not known.
    nothing = mesh.device.type == "cpu" and mesh.world == 1
    ran = None if nothing else record(session)
    times = [told.get(name, 0.0) / steps for name in PHASES]
    # A rank of which something is not known makes the mean nan.
    ranks = mesh.gather([*times, *(math.nan if each is None else each for each in (astuple(ran) if ran else _UNKNOWN))])
    means = [sum(each) / len(each) for each in zip(*ranks, strict=True)]
    most = [max(each) for each in zip(*ranks, strict=True)]
    phases = tuple(Phase(*part) for part in zip(PHASES, means, most, strict=False))
    step_s, communication, *rest = means[len(PHASES) :]
    exposed, idle = (None if math.isnan(each) else each for each in rest)
    recorded = None if math.isnan(step_s) else Activity(step_s, communication, exposed, idle)
    return Breakdown(mesh.device.type, len(ranks), steps, phases, recorded)


def record(session: Any) -> Activity | None:
    """Do a step under the device's profiler and return what ran in it; None where the profiler tells of nothing."""
    device = session.mesh.device
    module, kinds = devices.profiler(device), devices.activities(device)
    if device.type == "cuda":
        # The device's side alone: the host's side slows it down and says nothing that is asked here.
        kinds = kinds[-1:]
        if kinds[0] not in module.supported_activities():  # a PyTorch built without CUPTI
            return None
    with tempfile.TemporaryDirectory() as folder:
        handler = module.tensorboard_trace_handler(folder) if device.type == "npu" else None
        with module.profile(activities=kinds, on_trace_ready=handler) as profiler:
            # Profilers start late on some ranks, for which the first collective would wait.
            session.mesh.barrier()
            with torch.profiler.record_function(_WINDOW):
                session.step()
            devices.synchronize(device)
        if device.type == "npu":
            return of_table(Path(folder))
    return of_events(profiler.events(), device)


def of_events(events: Iterable[Any], device: torch.device) -> Activity | None:
    """Return what PyTorch's profiler events say: kernels and copies on a device, on a CPU gloo's collectives."""
    if device.type == "cpu":
        events = list(events)
        ((start, end),) = (_span(e) for e in events if e.name == _WINDOW)
        under_way = (_span(e) for e in events if e.name.startswith("gloo:"))
        return Activity(end - start, covered((max(a, start), min(b, end)) for a, b in under_way))
    # An annotation spans the kernels below it and the gaps between them.
    ran = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    if not ran:
        return None
    busy, computing = covered(map(_span, ran)), covered(_span(e) for e in ran if not _transfers(e.name))
    spans = [_span(e) for e in ran]
    step = max(end for _, end in spans) - min(start for start, _ in spans)
    return Activity(step, covered(_span(e) for e in ran if _transfers(e.name)), busy - computing, step - busy)


def of_table(folder: Path) -> Activity | None:
    """Return what torch_npu's profiler wrote of a recorded step, as it adds it up itself."""
    rows: list[dict[str, str]] = []
    for file in folder.rglob("step_trace_time.csv"):
        with file.open(newline="") as lines:
            rows += csv.DictReader(lines)
    computing, exposed, communication, idle = (sum(float(row[key]) for row in rows) / 1e6 for key in COLUMNS)
    return Activity(computing + exposed + idle, communication, exposed, idle) if rows else None


def covered(spans: Iterable[Span]) -> float:
    """Return how long at least one of the spans lasts; one that ends before it begins is none."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _span(event: Any) -> Span:
    """Return the seconds of an event of which PyTorch has microseconds."""
    return event.time_range.start / 1e6, event.time_range.end / 1e6


def _transfers(kernel: str) -> bool:
    return "nccl" in kernel.lower() or kernel.startswith("Memcpy PtoP")


def rows(found: Breakdown) -> list[tuple[str, str]]:
    """Return a breakdown as names and texts, for people; a phase of less than 0.05 % is left out, but never data."""
    step, ran = found.step_s, found.recorded
    spread = f" and {found.ranks} ranks" if found.ranks > 1 else ""
    out = [("marked step", f"{_time(step)}, mean of {found.steps} more{spread}")]
    for phase in found.phases:
        if phase.name == "data" or phase.seconds >= 0.0005 * step:
            slowest = f", slowest rank {_time(phase.slowest)}" if phase.slowest > 1.05 * phase.seconds else ""
            out.append((f"  {phase.name}", _share(phase.seconds, step) + slowest))
    if ran is not None:
        out.append(("recorded step", f"{_time(ran.step_s)}, one more, by the profiler"))
        if found.ranks > 1:
            beside = "" if ran.exposed is None else f", {_time(ran.exposed)} of it beside no computing"
            out.append(("  communication", _share(ran.communication, ran.step_s) + beside))
        if ran.idle is not None:
            out.append(("  idle", _share(ran.idle, ran.step_s)))
    if found.device == "cpu":
        out.append(("idle", "not told on a CPU"))
    elif ran is None:
        lacks = "communication, idle" if found.ranks > 1 else "idle"
        out.append((lacks, "not told: the profiler saw nothing run on the device"))
    return out


def _share(seconds: float, of: float) -> str:
    return f"{seconds / of if of else 0.0:6.1%}  {_time(seconds)}"


def _time(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
