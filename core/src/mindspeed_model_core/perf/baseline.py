"""The numbers to hold a measurement against: what was published, and what was recorded here before."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from rich.console import Console

from .. import chart
from ..errors import UserError, nearest
from . import provenance
from .measurement import Measurement, summary

FOLDER, PUBLISHED, PEERS = "perf_baselines", "published.csv", "peers.csv"
VARIABLE = "MINDSPEED_MODEL_BASELINES"
MFU = "% MFU"
LEAST_STEPS = 5
CHANGED = "with "
"""How the note of a row begins that is no recipe as it is: the changes follow, as on the command line."""
NO_BASELINE, WITHIN, SLOWER, FASTER = "no baseline", "within", "slower", "faster (record it)"


@dataclass(frozen=True)
class Published:
    """A row of published.csv: a speed published for Atlas hardware (``npu``) and, at times, for a reference GPU."""

    id: str
    model: str
    release: str
    title: str
    params: str
    task: str
    cluster: str
    hardware: str
    precision: str
    npu: float | None
    reference: float | None
    unit: str
    mean_seq_len: str
    status: str
    note: str
    source: str

    @property
    def devices(self) -> int:
        """How many devices the cluster has: nodes x devices of a node; an Atlas A3 counts as its two dies."""
        count = math.prod(int(n) for n in self.cluster.split("x"))
        return 2 * count if self.hardware == "Atlas A3" and self.cluster.endswith("x8") else count

    @property
    def label(self) -> str:
        """What was trained, in a few words."""
        length = f", {self.mean_seq_len}" if self.mean_seq_len else ""
        return f"{self.title} {self.params} {self.task}{length}"


@dataclass(frozen=True)
class Row:
    """A row of ``<model>.csv``: a recorded measurement.

    ``spread`` is the inter-quartile range over the median, ``mfu`` a fraction of a known peak, ``tolerance`` (empty:
    the default) the fraction by which a later measurement may differ, ``reproduces`` a published row's id.
    """

    hardware: str
    devices: int
    stack: str
    recipe: str
    digest: str
    commit: str
    date: str
    unit: str
    value: float
    spread: float
    step_s: float
    mfu: float | None
    peak_gib: float
    tolerance: float | None
    reproduces: str
    note: str


@dataclass(frozen=True)
class PeerRow:
    """A row of peers.csv: what another library did of a recipe's work, and what ours did in the same process.

    ``libraries`` are its versions, ``digest`` and ``commit`` those of ours beside it; ``value`` and ``ours``, the
    faster of ours, are in ``unit``; ``ratio`` is ours over its; ``of_matmul`` is its share of the product measured
    then; ``peak_gib`` is empty where sides were held at once.
    """

    hardware: str
    devices: int
    stack: str
    libraries: str
    model: str
    work: str
    recipe: str
    digest: str
    commit: str
    date: str
    mode: str
    settings: str
    unit: str
    value: float
    spread: float
    step_s: float
    mfu: float | None
    of_matmul: float
    peak_gib: float | None
    ours: float
    ratio: float


@dataclass(frozen=True)
class Verdict:
    """How a measurement stands against its baseline; ``ratio`` is measured over recorded."""

    status: str
    baseline: Row | None
    ratio: float | None
    tolerance: float

    @property
    def failed(self) -> bool:
        """Whether a gate must refuse it: slower, and also faster as long as it is not recorded."""
        return self.status in (SLOWER, FASTER)


def folder(path: Path | str | None = None) -> Path:
    """Return the baselines' folder: ``path``, else $MINDSPEED_MODEL_BASELINES, else the nearest up from here."""
    for given, origin in ((path, "--baselines"), (os.environ.get(VARIABLE), VARIABLE)):
        if given:
            if not (Path(given) / PUBLISHED).is_file():
                raise UserError(f"{origin}={str(given)!r}: no {PUBLISHED} in it; name the repository's {FOLDER} folder")
            return Path(given)
    here = Path.cwd()
    for parent in (here, *here.parents):
        if (parent / FOLDER / PUBLISHED).is_file():
            return parent / FOLDER
    raise UserError(
        f"no {FOLDER} folder in or above {here}: work inside a checkout of the model zoo's repository, or name its "
        f"copy with --baselines DIR or {VARIABLE}=DIR (an installed package does not carry it)"
    )


def published(where: Path, model: str | None = None) -> list[Published]:
    """Return the published rows, of one model package if named."""
    rows = _read(where / PUBLISHED, Published)
    return [r for r in rows if model is None or r.model == model]


def find(where: Path, row_id: str) -> Published:
    """Return the published row of that id."""
    rows = {r.id: r for r in published(where)}
    if row_id not in rows:
        raise UserError(f"reproduces={row_id!r}: no such id in {where / PUBLISHED}{nearest(row_id, rows)}")
    return rows[row_id]


def read(where: Path, model: str) -> list[Row]:
    """Return what is recorded for a model, oldest first; nothing when it has no file yet."""
    path = where / f"{model}.csv"
    return _read(path, Row) if path.exists() else []


def compare(measured: Measurement, rows: Sequence[Row], *, tolerance: float | None = None) -> Verdict:
    """Hold a measurement against the newest row of its hardware, device count, recipe digest and unit.

    The tolerance is two-sided: the row's own, else ``tolerance``, else 10 % on CPU and 5 % elsewhere. A speed the
    tolerance does not cover is ``slower`` or ``faster (record it)``.
    """
    default = tolerance if tolerance is not None else 0.10 if measured.device == "cpu" else 0.05
    for row in reversed(rows):
        if _key(row) != (measured.hardware, measured.devices, measured.digest):
            continue
        value = measured.value(row.unit)
        if value is None:
            continue
        allowed = row.tolerance if row.tolerance is not None else default
        ratio = value / row.value
        status = SLOWER if ratio < 1 - allowed else FASTER if ratio > 1 + allowed else WITHIN
        return Verdict(status, row, ratio, allowed)
    return Verdict(NO_BASELINE, None, None, default)


def record(measured: Measurement, where: Path, *, allow_dirty: bool = False, note: str = "") -> Row:
    """Append a measurement to ``<model>.csv`` in one move, and return its row.

    Raises UserError when its origin is not known: no commit or version, uncommitted changes (unless ``allow_dirty``,
    which leaves the mark ``+dirty``), no digest, hardware, stack or date, or too few steps for a spread. The
    tolerance of an older row of the same hardware and recipe is kept.
    """
    _check(measured, allow_dirty)
    unit = _unit(measured, where)
    value = _positive(measured, unit)
    known = measured.peak.source != "measured matmul"
    if not known:
        note = "; ".join(filter(None, (note, f"{measured.mfu:.1%} of a measured matmul")))
    path = where / f"{measured.model}.csv"
    with _locked(where):
        rows = read(where, measured.model)
        key = (measured.hardware, measured.devices, measured.digest)
        tolerance = next((r.tolerance for r in reversed(rows) if _key(r) == key and r.unit == unit), None)
        row = Row(
            hardware=measured.hardware,
            devices=measured.devices,
            stack=measured.stack,
            recipe=measured.recipe,
            digest=measured.digest,
            commit=measured.commit or "",
            date=measured.date,
            unit=unit,
            value=_figures(value),
            spread=_figures(measured.spread, 3),
            step_s=_figures(measured.step_s),
            mfu=_figures(measured.mfu, 4) if known else None,
            peak_gib=_figures(measured.peak_bytes / 2**30, 4),
            tolerance=tolerance,
            reproduces=measured.reproduces or "",
            note=note,
        )
        _append(path, [row])
    return row


def record_peers(
    found: Sequence[tuple[Measurement, Mapping[str, str], float, float]],
    where: Path,
    *,
    alone: bool = True,
    allow_dirty: bool = False,
) -> list[PeerRow]:
    """Append what peers did to peers.csv, all in one move, and return the rows.

    Each is what was measured beside ours, the fields of its row that a measurement does not have (``libraries``,
    ``work``, ``mode``, ``settings``), its share of the measured matrix product, and ours over its speed. The memory is
    its own if it ran ``alone``. Raises UserError like ``record``.
    """
    rows = []
    for measured, fields_, of_matmul, ratio in found:
        _check(measured, allow_dirty)
        value = _positive(measured, measured.unit)
        known = measured.peak.source != "measured matmul"
        rows.append(
            PeerRow(
                hardware=measured.hardware,
                devices=measured.devices,
                stack=measured.stack,
                model=measured.model,
                recipe=measured.recipe,
                digest=measured.digest,
                commit=measured.commit or "",
                date=measured.date,
                unit=measured.unit,
                value=_figures(value),
                spread=_figures(measured.spread, 3),
                step_s=_figures(measured.step_s),
                mfu=_figures(measured.mfu, 4) if known else None,
                of_matmul=_figures(of_matmul, 4),
                peak_gib=_figures(measured.peak_bytes / 2**30, 4) if alone else None,
                ours=_figures(value * ratio),
                ratio=_figures(ratio, 4),
                **fields_,
            )
        )
    with _locked(where):
        read_peers(where)
        _append(where / PEERS, rows)
    return rows


def read_peers(where: Path) -> list[PeerRow]:
    """Return what is recorded of peers, oldest first; nothing when there is no file yet."""
    path = where / PEERS
    return _read(path, PeerRow) if path.exists() else []


def _check(measured: Measurement, allow_dirty: bool) -> None:
    """Raise UserError unless the origin of a measurement is known and it has a spread."""
    _check_commit(measured.commit, allow_dirty)
    for name in ("hardware", "digest", "stack", "date", "recipe"):
        if not getattr(measured, name).strip():
            raise UserError(f"record: {name} is not known; a number without it cannot be recorded")
    _check_steps(measured.steps)


def _positive(measured: Measurement, unit: str) -> float:
    value = measured.value(unit)
    if value is None or not math.isfinite(value) or value <= 0:
        raise UserError(f"record: the measured speed is {value} {unit}, not a positive number")
    return value


def _check_steps(steps: int) -> None:
    if steps < LEAST_STEPS:
        raise UserError(f"record: --steps={steps}: {LEAST_STEPS} or more timed steps are needed for a spread")


def prepare(
    model_package: str,
    reproduces: str | None,
    *,
    steps: int,
    baselines: Path | str | None = None,
    record: bool,
    allow_dirty: bool,
    files: Sequence[Path] = (),
) -> Path:
    """Return the baselines' folder, and raise now what would stop a comparison or a record after measuring."""
    where = folder(baselines)
    if reproduces:
        find(where, reproduces)
    if record:
        _check_steps(steps)
        _check_commit(provenance.commit(model_package, files=files), allow_dirty)
        if not os.access(where, os.W_OK):
            raise UserError(f"{where}: not writable; --record needs to add a row there")
    return where


def report(
    measured: Measurement,
    where: Path | None,
    *,
    gate: bool = False,
    keep: bool = False,
    allow_dirty: bool = False,
    tolerance: float | None = None,
    console: Console | None = None,
) -> int:
    """Print a measurement and how it stands, record it if ``keep``, and return the exit status.

    With ``gate`` the status is 1 when the speed is outside the tolerance, unless this call records it, and it is a
    UserError when nothing recorded is comparable. Ranks other than 0 print nothing and return 0. ``where`` is None when
    there is no folder to compare with.
    """
    if _rank() != 0:
        return 0
    console = console or Console()
    console.print(summary(measured))
    if where is None:
        return 0
    if measured.reproduces:
        console.print(_against(measured, find(where, measured.reproduces)), highlight=False, soft_wrap=True)
    verdict = compare(measured, read(where, measured.model), tolerance=tolerance)
    console.print(spoken(verdict), highlight=False, soft_wrap=True)
    if keep:
        record(measured, where, allow_dirty=allow_dirty)
        console.print(f"recorded in {where / f'{measured.model}.csv'}", highlight=False, soft_wrap=True)
        return 0
    if gate and verdict.baseline is None:
        raise UserError(_nothing(measured, where))
    return 1 if gate and verdict.failed else 0


def _nothing(measured: Measurement, where: Path) -> str:
    """Say that there is no baseline, how near the nearest is, and how to make one."""
    m = measured
    same = [
        r
        for r in latest(read(where, m.model))
        if (r.hardware, r.devices, r.recipe) == (m.hardware, m.devices, m.recipe)
    ]
    other = f" (recorded there: digest {', '.join(r.digest for r in same)})" if same else ""
    return (
        f"--compare: {where / f'{m.model}.csv'} holds no speed of recipe {m.recipe}, digest {m.digest}, on "
        f"{m.devices} x {m.hardware}{other}; the same command with --record adds it"
    )


def _rank() -> int:
    # The process group may be closed by now; torchrun's environment is not.
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", "0"))


def spoken(verdict: Verdict) -> str:
    """Return a verdict in words, with rich's markup."""
    row, ratio = verdict.baseline, verdict.ratio
    if row is None or ratio is None:
        return f"baseline: {verdict.status} for this hardware, device count and recipe"
    colour = {WITHIN: "green", SLOWER: "red"}.get(verdict.status, "yellow")
    return (
        f"baseline: [{colour}]{verdict.status}[/], {ratio - 1:+.1%} against {number(row.value)} {row.unit} of "
        f"{row.date} ({row.commit}), tolerance ±{verdict.tolerance:.0%}"
    )


def _against(measured: Measurement, row: Published) -> str:
    value = measured.value(row.unit)
    text = f"published: {number(row.npu)} {row.unit} on {row.cluster} {row.hardware} ({row.release})"
    if value is None or row.npu is None:
        return f"{text}; not comparable with {measured.unit}"
    text += f"; here {number(value)} {row.unit}"
    if not comparable(row, row.unit, measured.devices, measured.peak.source != "measured matmul"):
        return f"{text}, on other terms ({measured.devices} x {measured.hardware})"
    return f"{text}, {value / row.npu:.2f} x"


def comparable(row: Published, unit: str, devices: int, peak_known: bool) -> bool:
    """Return whether a ratio says something: per-device units always, global ones for as many devices."""
    if unit == MFU:
        return peak_known
    return unit.endswith("/device") or devices == row.devices


def _unit(measured: Measurement, where: Path) -> str:
    """Return the unit to record in: the published row's if it is a rate this task has, else the task's own."""
    if measured.reproduces:
        wanted = find(where, measured.reproduces).unit
        if wanted != MFU and measured.value(wanted) is not None:
            return wanted
    return measured.unit


def _check_commit(commit: str | None, allow_dirty: bool) -> None:
    if not commit or commit == "unknown":
        raise UserError("record: the code's commit is not known; commit the checkout, or install the packages")
    if "+dirty" in commit and not allow_dirty:
        raise UserError(f"record: commit={commit}: the sources hold changes; commit them, or pass --allow-dirty")


def _key(row: Row) -> tuple[str, int, str]:
    return row.hardware, row.devices, row.digest


def _figures(value: float, digits: int = 6) -> float:
    return float(f"{value:.{digits}g}")


T = TypeVar("T", Published, Row, PeerRow)


def _read(path: Path, kind: type[T]) -> list[T]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    lines = csv.reader(io.StringIO(text))
    wanted = [f.name for f in fields(kind)]
    header = next(lines, None)
    if header != wanted:
        raise UserError(f"{path}:1: the columns are {','.join(header or ())!r}, they must be {','.join(wanted)!r}")
    return [_parse(cells, kind, f"{path}:{lines.line_num}") for cells in lines if cells]


def _parse(cells: list[str], kind: type[T], where: str) -> T:
    columns = fields(kind)
    if len(cells) != len(columns):
        raise UserError(f"{where}: {len(cells)} cells for {len(columns)} columns")
    values: dict[str, Any] = {}
    for column, cell in zip(columns, cells, strict=True):
        number, optional = str(column.type).split(" | ")[0], "None" in str(column.type)
        try:
            if number == "str":
                values[column.name] = cell
            elif not cell and optional:
                values[column.name] = None
            else:
                values[column.name] = int(cell) if number == "int" else _finite(cell)
        except ValueError:
            raise UserError(f"{where}: {column.name}={cell!r} is not a number") from None
    return kind(**values)


def _finite(cell: str) -> float:
    value = float(cell)
    if not math.isfinite(value):
        raise ValueError
    return value


def _append(path: Path, rows: Sequence[Row] | Sequence[PeerRow]) -> None:
    if not rows:
        return
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if not text:
        writer.writerow(f.name for f in fields(rows[0]))
    elif not text.endswith("\n"):
        out.write("\n")
    for row in rows:
        writer.writerow("" if v is None else v for v in asdict(row).values())
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text + out.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(where: Path) -> Iterator[None]:
    """Let one process at a time add to the folder, so that two measurements ending together are both kept."""
    import fcntl

    handle = os.open(where, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def latest(rows: Sequence[Row]) -> list[Row]:
    """Return the newest row of each recipe digest, hardware and device count."""
    return list({(*_key(r), r.unit): r for r in rows}.values())


def in_unit(row: Row, unit: str) -> float | None:
    """Return a recorded speed in another unit, where the row holds it."""
    if unit == row.unit:
        return row.value
    return 100 * row.mfu if unit == MFU and row.mfu is not None else None


def number(value: float | None) -> str:
    """Return a speed as it is read."""
    return "not published" if value is None else chart.plain(value)
