"""What a run tells while it trains: metrics.jsonl, trackers, progress, and a chart at the end."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch
import torch.distributed as dist

from . import chart, peak
from . import device as devices
from .chart import short
from .errors import UserError, nearest
from .recipe import Recipe
from .task import Unit, Work

FILE, CHART = "metrics.jsonl", "loss.png"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: values as host floats, ``work`` over all devices, ``seconds`` of it, peak bytes of memory."""

    step: int
    loss: float
    grad_norm: float | None
    lr: float
    work: Work
    seconds: float
    memory: int = 0


class Recorder:
    """Write the records of a run on rank 0; on other ranks do nothing.

    Every ``metrics.every`` steps (and at the first and the last) one JSON line goes to ``<run_dir>/metrics.jsonl``, to
    the trackers and to ``stream``: a progress bar on a terminal, plain lines elsewhere. Rates cover all steps since
    the line before. ``resume_step`` continues a run after that step: later records are dropped, so is a line that a
    killed process left half written. Without it the folder must hold no records. Nothing is written or changed before
    the first record, and nothing here touches the device.
    """

    def __init__(
        self,
        run_dir: Path | str,
        recipe: Recipe,
        *,
        rank: int | None = None,
        resume_step: int | None = None,
        unit: Unit = "samples",
        device: torch.device | None = None,
        devices_used: int | None = None,
        stream: TextIO | None = None,
    ) -> None:
        ranked = dist.is_available() and dist.is_initialized()
        self._active = (rank if rank is not None else dist.get_rank() if ranked else 0) == 0
        self._closed = not self._active
        if not self._active:
            return
        self.run_dir, self._recipe, self._unit = Path(run_dir), recipe, unit
        self._devices = devices_used or (dist.get_world_size() if ranked else 1)
        best = peak.known_peak(devices.name(device), recipe.precision) if device is not None else None
        self._peak = best.flops if best else None
        self._pending: list[StepRecord] = []
        self._first = True
        self._resume_step = resume_step
        self._kinds = _tracker_kinds(recipe)
        self._trackers: list[Any] = []
        self._path = self.run_dir / FILE
        self._file: FileIO | None = None
        if resume_step is None and self._path.exists() and self._path.stat().st_size:
            raise UserError(f"{self._path}: a run is recorded here already; resume it, or choose another run folder")
        stream = stream or sys.stdout
        self._view: _View = _Bar(stream, recipe) if _is_terminal(stream) else _Lines(stream, recipe)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        # What ended the run must reach the user, not what then fails because of it, such as a chart on a full disk.
        with suppress(OSError) if error is not None else nullcontext():
            self.close()

    def step(self, record: StepRecord) -> None:
        """Take the record of one step."""
        if not self._active:
            return
        self._pending.append(record)
        if self._first or record.step % self._recipe.metrics.every == 0 or record.step >= self._recipe.steps:
            self._flush()

    def flush(self) -> None:
        """Write what is pending, whatever ``metrics.every`` says."""
        if self._active and self._pending:
            self._flush()

    def close(self) -> None:
        """Write what is pending, end the trackers and the progress, and draw ``<run_dir>/loss.png``."""
        if self._closed:
            return
        self._closed = True
        self.flush()
        self._active = False
        self._view.close()
        if self._file is None:
            return
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()
        if _has("matplotlib"):
            plot(self.run_dir)

    def _flush(self) -> None:
        if self._file is None:
            self._file = self._open()
        values = _values(self._pending, self._unit, self._devices, self._peak)
        self._pending, self._first = [], False
        line = json.dumps({k: _json(v) for k, v in values.items()}, separators=(", ", ": "), allow_nan=False)
        _append(self._file, self._path, line.encode() + b"\n")
        self._view.show(values)
        for tracker in self._trackers:
            tracker.log(_grouped(values), step=values["step"])

    def _open(self) -> FileIO:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self._resume_step is not None:
            _rewind(self._path, self._resume_step)
        self._trackers = [_open_tracker(*kind, self.run_dir, self._recipe, self._resume_step) for kind in self._kinds]
        # Unbuffered: one write per line, so that a killed process loses at most the line it was writing.
        return FileIO(self._path, "ab")


def _append(file: FileIO, path: Path, line: bytes) -> None:
    """Write a line whole or not at all."""
    start = file.seek(0, os.SEEK_END)
    try:
        done = file.write(line)
        while done < len(line):
            done += file.write(line[done:])
    except OSError as error:
        with suppress(OSError):
            file.truncate(start)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _values(records: Sequence[StepRecord], unit: Unit, count: int, peak: float | None) -> dict[str, Any]:
    """Return one line's values: those of the last step, and rates over all the steps given."""
    last = records[-1]
    seconds = max(sum(r.seconds for r in records), 1e-9)
    samples, units = sum(r.work.samples for r in records), sum(r.work.units for r in records)
    flops = sum(r.work.flops for r in records) / seconds / count
    return {
        "step": last.step,
        "loss": last.loss,
        "grad_norm": last.grad_norm,
        "lr": last.lr,
        "unit": unit,
        "samples": samples,
        "units": units,
        "seconds": round(seconds, 6),
        "seconds_per_step": _figures(seconds / len(records)),
        "samples_per_s": _figures(samples / seconds),
        "units_per_s": _figures(units / seconds),
        "units_per_s_per_device": _figures(units / seconds / count),
        "tflops_per_device": _figures(flops / 1e12),
        "mfu": _figures(flops / peak) if peak else None,
        "memory_bytes": max(r.memory for r in records),
        "time": round(time.time(), 3),
    }


def _figures(value: float) -> float:
    return float(f"{value:.6g}")


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_TRAIN = ("loss", "grad_norm", "lr")


def _grouped(values: dict[str, Any]) -> dict[str, float]:
    skipped = ("step", "unit", "time")
    return {
        f"{'train' if k in _TRAIN else 'speed'}/{k}": v for k, v in values.items() if k not in skipped and v is not None
    }


def read(run_dir: Path | str) -> list[dict[str, Any]]:
    """Return a run's records in order; a half-written last line is left out.

    A loss or norm that was not finite is None. Raises UserError for a line that is broken elsewhere.
    """
    path = Path(run_dir) / FILE
    if not path.exists():
        raise UserError(f"{path}: no such file; this is not the folder of a run that wrote metrics")
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a step record; remove the line to go on") from None
        records.append(record)
    return records


def _rewind(path: Path, step: int) -> None:
    """Keep the records up to ``step``, in one move."""
    if not path.exists():
        return
    kept = [r for r in read(path.parent) if r["step"] <= step]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        for record in kept:
            file.write(json.dumps(record, separators=(", ", ": ")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _tracker_kinds(recipe: Recipe) -> list[tuple[str, Any]]:
    """Return name and class of accelerate's trackers that the recipe asks for."""
    asked = recipe.metrics.trackers
    if asked == () or (asked is None and not (_has("accelerate") and _has("tensorboard"))):
        return []
    if not _has("accelerate"):
        raise UserError(f"metrics.trackers={list(asked or ())}: accelerate is not installed; pip install accelerate")
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = {str(name): kind for name, kind in LOGGER_TYPE_TO_CLASS.items()}
    shipped = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    kinds = {}
    for name in asked if asked is not None else ("tensorboard",):
        if name not in known:
            raise UserError(f"metrics.trackers={name!r}: no such tracker{nearest(name, known)}")
        if name not in shipped and known[name].__module__ == "accelerate.tracking":
            raise UserError(f"metrics.trackers={name!r}: its package is not installed; pip install {name}")
        kinds[name] = known[name]
    return list(kinds.items())


def _open_tracker(name: str, kind: Any, run_dir: Path, recipe: Recipe, resume_step: int | None) -> Any:
    from accelerate import PartialState

    # The trackers log through accelerate's logger, which refuses to work without this state.
    PartialState()
    arguments: dict[str, Any] = {}
    if kind.requires_logging_directory:
        folder = run_dir / name
        folder.mkdir(exist_ok=True)
        arguments["logging_dir"] = str(folder)
    if name == "tensorboard" and resume_step is not None:
        arguments["purge_step"] = resume_step + 1
    tracker = kind(recipe.name, **arguments)
    if hasattr(tracker, "start"):
        tracker.start()
    if name == "tensorboard":
        # Its hyper-parameter view makes a second run of every run; as text the recipe stays with this one.
        tracker.log({"recipe": "    " + recipe.to_yaml().replace("\n", "\n    ")}, step=resume_step or 0)
    else:
        tracker.store_init_configuration(_flat(recipe.model_dump(mode="json")))
    return tracker


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
    return out


def _has(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is not None


class _View(Protocol):
    def show(self, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _details(values: dict[str, Any]) -> list[str]:
    unit = values["unit"]
    out = [f"loss {values['loss']:.4f}"]
    if values["grad_norm"] is not None:
        out.append(f"grad {values['grad_norm']:.3g}")
    out.append(f"lr {values['lr']:.2e}")
    out.append(f"{short(values['units_per_s'])} {unit}/s")
    if values["mfu"] is not None:
        out.append(f"MFU {values['mfu']:.1%}")
    elif values["tflops_per_device"] > 0:
        out.append(f"{short(values['tflops_per_device'] * 1e12, unit='FLOP/s')} per device")
    if values["memory_bytes"]:
        out.append(f"{values['memory_bytes'] / 2**30:.1f} GiB")
    return out


def _fitting(details: list[str], room: int) -> str:
    """Join as many details as a terminal has room for: loss and speed before the others."""
    for kept in range(len(details), 1, -1):
        speed = next(i for i, text in enumerate(details) if text.endswith("/s"))
        order = sorted(range(len(details)), key=lambda i: (i not in (0, speed), i))[:kept]
        line = " · ".join(details[i] for i in sorted(order))
        if len(line) <= room:
            return line
    return details[0]


class _Lines:
    """One plain line per record."""

    def __init__(self, stream: TextIO, recipe: Recipe) -> None:
        self._stream, self._steps = stream, recipe.steps

    def show(self, values: dict[str, Any]) -> None:
        step = f"step {values['step']:>{len(str(self._steps))}}/{self._steps}"
        took = f"{values['seconds_per_step']:.3g} s/step"
        print("  ".join([step, *_details(values), took]), file=self._stream, flush=True)

    def close(self) -> None:
        pass


class _Bar:
    """A live bar with the latest values and the time left."""

    def __init__(self, stream: TextIO, recipe: Recipe) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=stream, force_terminal=True)
        bar = 24 if console.width >= 120 else 10
        # Beside the details stand the name, the bar, "step/steps", the time left and a space after each.
        self._room = console.width - len(recipe.name) - bar - 2 * len(str(recipe.steps)) - len("/ 0:00:00") - 4
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=bar),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[details]}"),
            console=console,
        )
        self._recipe = recipe
        self._task: Any = None

    def show(self, values: dict[str, Any]) -> None:
        details = _fitting(_details(values), self._room)
        if self._task is None:
            # Begun at the first step shown, so that the time left of a resumed run is right.
            self._task = self._progress.add_task(
                self._recipe.name, total=self._recipe.steps, completed=values["step"], details=details
            )
            self._progress.start()
        self._progress.update(self._task, completed=values["step"], details=details)

    def close(self) -> None:
        self._progress.stop()


def plot(run_dir: Path | str) -> Path | None:
    """Draw a run's loss and speed over its steps as ``<run_dir>/loss.png``; None when nothing is recorded yet."""
    records = read(run_dir)
    if not records:
        return None
    steps = [float(r["step"]) for r in records]
    losses = [math.nan if r["loss"] is None else float(r["loss"]) for r in records]
    figure = chart.figure(9, 6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _plot_loss(top, steps, losses)
    _plot_speed(bottom, records, steps)
    bottom.set_xlabel("step", color=chart.INK)
    chart.ticks(bottom.xaxis)
    if len(steps) > 1:
        margin = 0.015 * (steps[-1] - steps[0])
        bottom.set_xlim(steps[0] - margin, steps[-1] + margin)
    figure.tight_layout(h_pad=1.6)
    return chart.write(figure, Path(run_dir) / CHART)


def _plot_loss(axes: Any, steps: list[float], losses: list[float]) -> None:
    x, y = _binned(steps, losses)
    finite = [v for v in losses if math.isfinite(v)]
    many = len(finite) >= 40
    marker = "o" if len(x) <= 20 else None
    axes.plot(x, y, color=chart.COLOURS[0], linewidth=0.8 if many else 1.8, alpha=0.35 if many else 1, marker=marker)
    if many:
        axes.plot(x, _smooth(y), color=chart.COLOURS[0], linewidth=2)
    chart.style(axes)
    title = "Loss"
    if finite:
        title += f"   {finite[0]:.4g} → {finite[-1]:.4g}"
        if min(finite) > 0 and max(finite) / min(finite) > 20:
            axes.set_yscale("log")
            title += "   (log scale)"
            chart.ticks(axes.yaxis)
    missing = [s for s, v in zip(steps, losses, strict=True) if not math.isfinite(v)]
    if missing:
        for step in missing[:50]:
            axes.axvline(step, color=chart.COLOURS[5], linewidth=1, alpha=0.6)
        title += f"   not finite at {len(missing)} of {len(steps)} records, first at step {missing[0]:.0f}"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=chart.INK)


def _plot_speed(axes: Any, records: list[dict[str, Any]], steps: list[float]) -> None:
    speeds = [float(r["units_per_s"]) for r in records]
    # The first record holds compilation, allocation and warm-up; the axis is for the steady state.
    steady = speeds[1:] or speeds
    median = statistics.median(steady)
    x, y = _binned(steps, speeds)
    axes.plot(x, y, color=chart.COLOURS[2], linewidth=1.4, marker="o" if len(x) <= 20 else None)
    axes.axhline(median, color=chart.GREY, linewidth=1, linestyle=(0, (4, 3)))
    chart.style(axes)
    axes.set_ylim(0, 1.15 * max(*steady, median, 1e-12))
    chart.ticks(axes.yaxis)
    title = f"Speed   median {short(median)} {records[-1]['unit']}/s"
    mfus = [r["mfu"] for r in (records[1:] or records) if r.get("mfu") is not None]
    tflops = statistics.median(r["tflops_per_device"] for r in (records[1:] or records))
    if tflops > 0:
        title += f", {short(tflops * 1e12, unit='FLOP/s')} per device"
    if mfus:
        title += f", MFU {statistics.median(mfus):.1%}"
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=chart.INK)


def _binned(x: list[float], y: list[float], most: int = 2000) -> tuple[list[float], list[float]]:
    """Return the means of at most ``most`` runs of neighbours, so that a million steps draw as fast as a thousand."""
    size = math.ceil(len(x) / most)
    if size <= 1:
        return x, y
    starts = range(0, len(x), size)
    return [statistics.fmean(x[i : i + size]) for i in starts], [statistics.fmean(y[i : i + size]) for i in starts]


def _smooth(values: list[float]) -> list[float]:
    """Return the mean over a centred window of a 20th of the values, over what is finite in it."""
    most = max(2, len(values) // 40)
    out = []
    for i in range(len(values)):
        # Narrower towards the ends, where a lopsided window would bend the curve.
        half = min(most, i, len(values) - 1 - i)
        window = [v for v in values[i - half : i + half + 1] if math.isfinite(v)]
        out.append(statistics.fmean(window) if window else math.nan)
    return out
