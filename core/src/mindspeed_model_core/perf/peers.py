"""Ours beside what people would pick instead: the same work, on the same device, in one process.

A model's ``benchmarks/peers.py`` says what is compared: recipes, and how another library's network computes the loss of
a batch of ours. All else is here: the plain training loop around that network, equal weights, turns, clocks, memory,
the check that both sides did the same work, the table and the records.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import chart, cli
from .. import device as devices
from ..breakdown import Clock
from ..errors import UserError, nearest
from ..model import Model
from ..peak import Peak, known_peak, measured_peak
from ..recipe import Recipe
from . import baseline, provenance
from .measurement import Measurement, result
from .sides import Done, Peer, Step, open_ours, open_peer

LOSS = 0.02
"""How far two sides' losses may be apart, as a share, in each step."""
NORM = {"bf16-pure": 0.1, "bf16": 0.1, "fp32": 0.02, "fp64": 0.02}
"""How far their gradients' norms may be apart in the first step, which starts from the same weights."""
STEPS = {True: 60, False: 8}
"""Timed steps where sides take turns step by step, and where they follow one another."""


@dataclass(frozen=True)
class Comparison:
    """A recipe's work, changed by ``overrides``, that ours and peers do; ``ours`` are further changes, a row for each.

    With ``tiny``, for a CPU, all sides are held at once and take turns step by step, so that whatever else the machine
    does falls on all of them. Otherwise each is built, timed and freed before the next.
    """

    name: str
    recipe: str
    peers: tuple[Peer, ...]
    overrides: tuple[str, ...] = ()
    ours: tuple[tuple[str, ...], ...] = ((),)
    tiny: bool = False


@dataclass
class Side:
    """A row of a comparison: who, on which recipe, and what came of it; ``said`` is why there is no figure.

    ``ratio`` is its speed over the fastest peer's. ``broken`` says that what went wrong is no lack of memory or of an
    optional library.
    """

    recipe: Recipe
    changes: tuple[str, ...] = ()
    peer: Peer | None = None
    measured: Measurement | None = None
    seconds: list[float] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    peak_bytes: int = 0
    ratio: float | None = None
    said: str = ""
    broken: bool = False

    @property
    def name(self) -> str:
        """Return who it is, in a few words."""
        return "ours" if self.peer is None else f"{self.peer.library} {self.peer.mode}"

    @property
    def settings(self) -> str:
        """Return how it does the work."""
        recompute = {"none": "no recompute", "all": "all recomputed"}.get(
            str(self.recipe.recompute), f"{self.recipe.recompute} recomputed"
        )
        words = [f"micro batch {self.recipe.micro_batch}", recompute]
        if self.recipe.recompute_keep != "nothing":
            words.append(f"{self.recipe.recompute_keep} kept")
        if self.recipe.compile and self.peer is None:
            words.append("compiled whole" if self.recipe.compile == "whole" else "compiled")
        if self.recipe.cuda_graph and self.peer is None:
            words.append("replayed")
        if self.recipe.lora is not None:
            words.append(f"rank {self.recipe.lora.rank}")
        extra = "" if self.peer is None else self.peer.settings
        return ", ".join([*words, self.recipe.precision, *filter(None, [extra])])


@dataclass(frozen=True)
class Report:
    """A comparison's sides and what they stand on: the device and its rate of matrix products, measured here."""

    comparison: Comparison
    sides: tuple[Side, ...]
    device: torch.device
    ceiling: Peak

    @property
    def best(self) -> Side | None:
        """Return the fastest peer; None if none ran."""
        ran = [s for s in self.sides if s.peer is not None and s.measured is not None]
        return max(ran, key=_speed, default=None)

    @property
    def ours(self) -> list[Side]:
        """Return our sides that ran."""
        return [s for s in self.sides if s.peer is None and s.measured is not None]

    @property
    def broken(self) -> list[Side]:
        """Return the sides that should have run and did not, or that did other work."""
        return [s for s in self.sides if s.broken]


def _speed(side: Side) -> float:
    assert side.measured is not None
    return side.measured.value() or 0.0


def compare(
    model: Model,
    comparison: Comparison,
    *,
    device: torch.device,
    steps: int | None = None,
    warmup: int = 3,
    overrides: Sequence[str] = (),
    modes: Sequence[str] = (),
    quick: bool = False,
    files: Sequence[Path] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Time every side of a comparison and hold them against each other; ``modes`` chooses among the peers'.

    ``quick`` leaves the first row of ours and the first of each mode. ``overrides`` change the recipe of all sides. A
    peer that has no room, lacks a library, fails, or does other work than ours has no figure; ours must run, but for
    want of memory.
    """
    steps = STEPS[comparison.tiny] if steps is None else steps
    if steps < 1 or warmup < 1:
        raise UserError(f"steps={steps}, warmup={warmup}: a comparison needs 1 or more of both")
    sides = _sides(model, comparison, device, overrides, modes, quick)
    for side in sides:
        _look(side, device)
    ceiling = measured_peak(device, sides[0].recipe.precision)
    (_in_pairs if comparison.tiny else _in_turn)(sides, model, device, steps, warmup, say)
    _check_work(sides)
    for side in sides:
        if side.said or not side.done:
            continue
        # A peer's figure stands beside the recipe it was compared on, which is that of our first row.
        recipe = side.recipe if side.peer is None else sides[0].recipe
        precision = side.recipe.precision
        side.measured = result(
            recipe,
            model,
            device,
            [done.work for done in side.done[-steps:]],
            side.seconds,
            unit=model.task(side.recipe, model.config(side.recipe)).unit,
            warmup=warmup,
            peak=known_peak(devices.name(device), precision) or ceiling,
            peak_bytes=side.peak_bytes,
            files=files,
        )
    report = Report(comparison, tuple(sides), device, ceiling)
    _relate(report)
    return report


def _sides(
    model: Model,
    comparison: Comparison,
    device: torch.device,
    overrides: Sequence[str],
    modes: Sequence[str],
    quick: bool,
) -> list[Side]:
    """Return the rows to be on a device, recipes resolved; those of ours that replay steps are CUDA's."""
    common = (*comparison.overrides, *overrides)

    def resolved(changes: tuple[str, ...]) -> Recipe:
        return model.load_recipe(comparison.recipe, (*common, *changes))  # type: ignore[no-any-return]

    ours = [changes for changes in comparison.ours if device.type == "cuda" or not resolved(changes).cuda_graph]
    others = [peer for peer in comparison.peers if not modes or peer.mode in modes]
    if quick:
        ours, others = ours[:1], list({peer.mode: peer for peer in reversed(others)}.values())[::-1]
    sides = [Side(resolved(changes), (*common, *changes)) for changes in ours]
    for peer in others:
        sides.append(Side(resolved(peer.overrides), (*common, *peer.overrides), peer))
    return sides


def _look(side: Side, device: torch.device) -> None:
    """Say of a peer that it cannot run here; UserError for a recipe that no plain loop does."""
    if side.peer is None:
        return
    if side.recipe.precision == "bf16":
        raise UserError("precision=bf16: a peer's plain loop has no master weights; compare with bf16-pure or fp32")
    if side.recipe.recompute not in ("none", "all"):
        raise UserError(f"recompute={side.recipe.recompute}: peers recompute all blocks or none")
    missing = [name for name in _libraries(side) if _version(name) is None]
    if missing:
        side.said = f"{' and '.join(missing)} not installed"
    elif side.peer.accelerator and device.type == "cpu":
        side.said = "needs an accelerator"


def _libraries(side: Side) -> list[str]:
    assert side.peer is not None
    return [side.peer.library, *side.peer.needs, *(["peft"] if side.recipe.lora is not None else [])]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _open(side: Side, model: Model, device: torch.device) -> AbstractContextManager[Step]:
    if side.peer is None:
        return open_ours(side.recipe, model, device)
    return open_peer(side.peer, side.recipe, model, device)


def _in_turn(
    sides: Sequence[Side], model: Model, device: torch.device, steps: int, warmup: int, say: Callable[[str], None]
) -> None:
    """Build, warm up, time and free one side after the other."""
    for side in sides:
        if side.said:
            continue
        say(f"{side.name}, {side.settings} ...")
        with _noting(side):
            _time(side, model, device, steps, warmup)
        # At once: who ends a long comparison before its end still has what was seen.
        step, memory = statistics.median(side.seconds or [0.0]), side.peak_bytes / 2**30
        say(f"  {side.said or f'{_duration(step)} a step, {memory:.1f} GiB'}")
        try:
            _free(device)
        except RuntimeError as error:  # a kernel of this side left the device of no use to this process
            for later in sides:
                if not (later.done or later.said):
                    later.said, later.broken = f"not run, {side.name} broke the device: {str(error)[:60]}", True
            return


def _time(side: Side, model: Model, device: torch.device, steps: int, warmup: int) -> None:
    """Time one side alone; a function, so that nothing of it is left to hold memory when it returns."""
    with _open(side, model, device) as step:
        reads = [step() for _ in range(warmup)]
        devices.synchronize(device)
        devices.reset_peak_memory(device)
        clock = Clock(device)
        clock.mark()
        for _ in range(steps):
            reads.append(step())
            clock.mark()
        devices.synchronize(device)
        side.seconds = clock.seconds()
        side.peak_bytes = devices.peak_memory(device)
        side.done = [read() for read in reads]


def _in_pairs(
    sides: Sequence[Side], model: Model, device: torch.device, steps: int, warmup: int, say: Callable[[str], None]
) -> None:
    """Hold all sides and let each do a step in turn, every other time the other way round."""
    held: dict[int, Step] = {}
    with ExitStack() as stack:
        for place, side in enumerate(sides):
            if not side.said:
                with _noting(side):
                    held[place] = stack.enter_context(_open(side, model, device))
        say(f"{len(held)} sides, step by step ...")
        for number in range(warmup + steps):
            order = sorted(held)
            for place in order if number % 2 else reversed(order):
                side = sides[place]
                with _noting(side):
                    begun = time.perf_counter()
                    read = held[place]()
                    devices.synchronize(device)
                    seconds = time.perf_counter() - begun
                    side.done.append(read())
                    if number >= warmup:
                        side.seconds.append(seconds)
                if side.said:
                    del held[place]
        for side in sides:
            side.peak_bytes = devices.peak_memory(device)
        held.clear()
    _free(device)


def _free(device: torch.device) -> None:
    """Let go of a side's memory and of what was compiled for it."""
    gc.collect()
    torch._dynamo.reset()
    if device.type != "cpu":
        devices.module(device).empty_cache()


@contextmanager
def _noting(side: Side) -> Iterator[None]:
    """Keep a lack of memory to its row, and whatever else goes wrong in a peer."""
    try:
        yield
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
            side.said = "out of memory"
        elif side.peer is None or isinstance(error, UserError):
            raise
        else:
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            side.said, side.broken = f"{type(error).__name__}: {line[:160]}", True


def _check_work(sides: Sequence[Side]) -> None:
    """Refuse a side whose losses or first gradient are not those of the first side that ran."""
    ran = [side for side in sides if not side.said and side.done]
    for side in ran[1:]:
        for number, (one, other) in enumerate(zip(ran[0].done, side.done, strict=True), 1):
            pairs = [("loss", one.loss, other.loss, LOSS)]
            if number == 1 and one.norm is not None and other.norm is not None:
                pairs.append(("gradient norm", one.norm, other.norm, NORM[side.recipe.precision]))
            for what, wanted, found, most in pairs:
                # Not the other way round: what is not a number must not pass.
                if not abs(found - wanted) <= most * abs(wanted):
                    side.said = (
                        f"does other work: {what} {found:.5g} in step {number}, {ran[0].name} {wanted:.5g} "
                        f"(may differ by {most:.0%})"
                    )
                    side.broken = True
                    break
            if side.said:
                break


def _relate(report: Report) -> None:
    """Set each side's speed over the fastest peer's; step by step where they took turns so."""
    best = report.best
    if best is None:
        return
    for side in report.sides:
        if side.measured is None or side.recipe.precision != best.recipe.precision:
            continue
        if report.comparison.tiny:
            side.ratio = statistics.median(b / a for a, b in zip(side.seconds, best.seconds, strict=True))
        else:
            side.ratio = _speed(side) / _speed(best)


def table(report: Report) -> Table:
    """Return a comparison as a table, a row for each side."""
    rows = [s.measured for s in report.sides if s.measured is not None]
    recipe = report.sides[0].recipe
    out = Table(title=f"{report.comparison.name}: {recipe.name} ({recipe.digest()})", title_justify="left", box=None)
    out.add_column("side", overflow="fold")
    for name in ("step", "quartiles", rows[0].unit if rows else "rate", "MFU", "of matmul", "memory", "x best peer"):
        out.add_column(name, justify="right", no_wrap=True)
    together = report.comparison.tiny or report.device.type == "cpu"
    for side in report.sides:
        name = f"[bold]{side.name}[/] [dim]{side.settings}[/]"
        m = side.measured
        if m is None:
            out.add_row(f"{name}\n  [yellow]{side.said}[/]", *["-"] * 7)
            continue
        low, high = m.quartiles
        out.add_row(
            name,
            _duration(m.step_s),
            f"{_duration(low)} to {_duration(high)}",
            chart.plain(m.value() or 0),
            f"{m.mfu:.1%}" if m.peak.source != report.ceiling.source else "-",
            f"{m.flops / report.ceiling.flops:.1%}",
            # That of the whole process on a CPU, of all sides where they are held at once.
            "-" if together else f"{m.peak_bytes / 2**30:.1f} GiB",
            "-" if side.ratio is None else f"[bold]{side.ratio:.3f}[/]",
        )
    return out


def _duration(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1e3 * seconds:.4g} ms"


def notes(report: Report) -> list[str]:
    """Return what one must know to read the table, a line each."""
    matmul = chart.short(report.ceiling.flops, unit="FLOP/s")
    turns = "in pairs, step by step" if report.comparison.tiny else "one after another"
    lines = [
        f"{devices.name(report.device)}; {provenance.stack()}; {', '.join(_versions(report)) or 'no peer'}",
        f"a matrix product in {report.sides[0].recipe.precision} here: {matmul}; sides ran {turns}, each step with its "
        "data, losses and the first gradient compared; x best peer: above 1 is faster",
    ]
    if report.device.type == "cpu":
        lines.append("on a CPU only the ratios matter: the sizes are those of tests, and no figure is a speed to quote")
    return lines


def _versions(report: Report) -> list[str]:
    names = dict.fromkeys(name for side in report.sides if side.peer is not None for name in _libraries(side))
    return [f"{name} {version}" for name in names if (version := _version(name)) is not None]


def _folder(given: Path | None, needed: bool) -> Path | None:
    try:
        return baseline.folder(given)
    except UserError:
        if given is not None or needed:
            raise
        return None


def _verdicts(report: Report, where: Path) -> list[str]:
    """Say of ours how it stands against what is recorded of the same work."""
    lines = []
    for side in report.ours:
        assert side.measured is not None
        verdict = baseline.compare(side.measured, baseline.read(where, side.measured.model))
        if verdict.baseline is not None:
            lines.append(f"ours, {side.settings}: {baseline.spoken(verdict)}")
    return lines


def keep(report: Report, where: Path, *, allow_dirty: bool = False) -> list[str]:
    """Add our rows to the model's baselines and the peers' to theirs, and return which files changed."""
    alike = [s for s in report.ours if s.ratio is not None]
    best = max(alike, key=_speed, default=None)
    for side in report.ours:
        assert side.measured is not None
        notes = [f"{baseline.CHANGED}{' '.join(side.changes)}"] if side.changes else []
        if report.comparison.tiny:
            notes.append("memory of all sides")
        baseline.record(side.measured, where, allow_dirty=allow_dirty, note="; ".join(notes))
    changed = [f"{s.measured.model}.csv" for s in report.ours[:1] if s.measured is not None]
    found = []
    for side in report.sides:
        if side.peer is None or side.measured is None or best is None or not best.ratio or not side.ratio:
            continue
        fields = {
            "libraries": ", ".join(f"{name} {_version(name)}" for name in _libraries(side)),
            "work": report.comparison.name,
            "mode": side.peer.mode,
            "settings": side.settings,
        }
        found.append((side.measured, fields, side.measured.flops / report.ceiling.flops, best.ratio / side.ratio))
    if found:
        baseline.record_peers(found, where, alone=not report.comparison.tiny, allow_dirty=allow_dirty)
        changed.append(baseline.PEERS)
    return changed


def chosen(comparisons: Sequence[Comparison], names: Sequence[str], device: torch.device) -> list[Comparison]:
    """Return the named comparisons, by default the tiny ones on a CPU and the others elsewhere."""
    known = {each.name: each for each in comparisons}
    for name in names:
        if name not in known:
            raise UserError(f"--work={name}: no such comparison{nearest(name, known)}")
    return [known[name] for name in names] or [c for c in comparisons if c.tiny == (device.type == "cpu")]


def _with_modes(comparisons: Sequence[Comparison], modes: Sequence[str]) -> list[Comparison]:
    """Return those that have a peer in one of the modes; UserError for a mode that no peer has."""
    known = list(dict.fromkeys(peer.mode for each in comparisons for peer in each.peers))
    for mode in modes:
        if mode not in known:
            names = " or ".join(each.name for each in comparisons)
            raise UserError(f"--mode={mode}: no peer of {names} has it{nearest(mode, known)}")
    return [each for each in comparisons if not modes or any(peer.mode in modes for peer in each.peers)]


def main(model: Model, comparisons: Sequence[Comparison], file: str) -> None:
    """Run ``file``, a model's ``benchmarks/peers.py`` with these comparisons, as a command."""

    def command(
        overrides: Annotated[
            list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipes of all sides.")
        ] = None,
        work: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="What is compared; several times.  \\[default: what is for this device]"),
        ] = None,
        mode: Annotated[
            list[str] | None,
            typer.Option(metavar="NAME", help="A mode of peers; several times.  \\[default: all]"),
        ] = None,
        quick: Annotated[
            bool, typer.Option("--quick", help="Of ours the first settings alone, and of each mode of peers.")
        ] = False,
        steps: Annotated[
            int | None,
            typer.Option(metavar="N", help=f"Steps timed.  \\[default: {STEPS[False]}; tiny ones {STEPS[True]}]"),
        ] = None,
        warmup: Annotated[int, typer.Option(metavar="N", help="Steps run before, not timed.")] = 3,
        record: Annotated[bool, typer.Option("--record", help="Add the results to the baselines.")] = False,
        record_cpu: Annotated[bool, typer.Option("--record-cpu", help="The same, also from a CPU.")] = False,
        baselines: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="The folder of baselines.  \\[default: perf_baselines, here or above]"),
        ] = None,
        allow_dirty: Annotated[
            bool, typer.Option("--allow-dirty", help="Record from changed sources, marked +dirty.")
        ] = False,
    ) -> None:
        source, device = Path(file).resolve(), devices.pick()
        wanted = _with_modes(chosen(comparisons, work or (), device), mode or ())
        # What a later one refuses is told before the first has cost its time.
        for each in wanted:
            for side in _sides(model, each, device, overrides or (), mode or (), quick):
                _look(side, device)
        record = record or record_cpu
        where = _folder(baselines, needed=record)
        if record:
            if device.type == "cpu" and not record_cpu:
                raise UserError(
                    "--record: on a CPU only the ratios matter; --record-cpu keeps its figures all the same"
                )
            for each in wanted:
                baseline.prepare(
                    model.package,
                    None,
                    steps=STEPS[each.tiny] if steps is None else steps,
                    baselines=where,
                    record=True,
                    allow_dirty=allow_dirty,
                    files=[source],
                )
        console = Console()
        if not console.is_terminal:
            console = Console(width=160)
        broken: list[str] = []
        for each in wanted:
            report = compare(
                model,
                each,
                device=device,
                steps=steps,
                warmup=warmup,
                overrides=overrides or (),
                modes=mode or (),
                quick=quick,
                files=[source],
                say=lambda text: console.print(f"[dim]{text}[/]", highlight=False),
            )
            console.print(table(report), highlight=False)
            for line in notes(report):
                console.print(f"[dim]{line}[/]", highlight=False, soft_wrap=True)
            if where is not None:
                for line in _verdicts(report, where):
                    console.print(line, highlight=False, soft_wrap=True)
            if where is not None and record:
                for name in keep(report, where, allow_dirty=allow_dirty):
                    console.print(f"recorded in {where / name}", highlight=False, soft_wrap=True)
            broken += [f"{each.name}: {side.name}" for side in report.broken]
        if broken:
            raise UserError(f"no fair comparison with {'; '.join(broken)}: see the table; --mode leaves modes out")

    lines = [f"{c.name} ({c.recipe}{', a CPU will do' if c.tiny else ''})" for c in comparisons]
    command.__doc__ = (
        f"Train {model.name} beside other libraries, on this device, in this process, and print how fast each is.\n\n"
        f"--work is one of {', '.join(lines)}; --mode one of "
        f"{', '.join(sorted({peer.mode for c in comparisons for peer in c.peers}))}."
    )
    cli.run_script(command)
