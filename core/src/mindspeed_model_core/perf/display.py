"""A model's recorded and published numbers, as a table and as a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from .. import chart
from ..errors import UserError, nearest
from .baseline import CHANGED, MFU, Published, Row, comparable, in_unit, latest, number, published, read


def _grouped(where: Path, model: str) -> list[tuple[Published | None, list[Row]]]:
    """Return each row published for an NPU with what repeats it, then what repeats none."""
    rows, told = latest(read(where, model)), [p for p in published(where, model) if p.npu]
    ids = {p.id for p in told}
    groups: list[tuple[Published | None, list[Row]]] = [(p, [r for r in rows if r.reproduces == p.id]) for p in told]
    names = dict.fromkeys(r.recipe for r in rows if r.reproduces not in ids)
    groups += [(None, [r for r in rows if r.recipe == name and r.reproduces not in ids]) for name in names]
    return groups


def table(where: Path, model: str, width: int = 200) -> Table:
    """Return a model's published speeds and, under each, what was measured here; below 120 columns the essential."""
    groups = _grouped(where, model)
    title = "measured against published" if any(rows for _, rows in groups) else "published, nothing measured yet"
    out = Table(title=f"{model}: {title}", title_justify="left", pad_edge=False, box=None)
    columns = ("recipe", "hardware", "speed", "vs NPU", "MFU", "step", "memory", "from")[: 4 if width < 120 else 8]
    for name in columns:
        text = name in ("recipe", "hardware", "from")
        out.add_column(name, justify="left" if text else "right", no_wrap=not text)

    def add(*cells: str) -> None:
        out.add_row(*cells[: len(columns)])

    for told, rows in groups:
        if told is not None:
            hardware = f"{told.devices} x {told.hardware}"
            source = f"[dim]{told.release}[/]"
            add(f"[bold]{told.label}[/]", hardware, f"{number(told.npu)} {told.unit}", "", "", "", "", source)
            if told.reference is not None:
                ratio = f"{told.reference / told.npu:.2f} x" if told.npu else ""
                speed = f"{number(told.reference)} {told.unit}"
                add("", "published reference GPU", speed, ratio, "", "", "", source)
        for row in rows:
            add(*_cells(row, told))
    return out


def _cells(row: Row, told: Published | None) -> tuple[str, ...]:
    ratio = ""
    if told is not None and told.npu:
        value = in_unit(row, told.unit)
        if value is not None and comparable(told, told.unit, row.devices, row.mfu is not None):
            ratio = f"{value / told.npu:.2f} x"
    return (
        f"  [cyan]{row.recipe}[/]" + (f" [dim]{row.note}[/]" if row.note.startswith(CHANGED) else ""),
        f"[cyan]{row.devices} x {row.hardware}[/]",
        f"[cyan]{number(row.value)} {row.unit}[/]",
        ratio,
        f"{row.mfu:.1%}" if row.mfu is not None else "",
        f"{row.step_s:.3g} s",
        f"{row.peak_gib:.3g} GiB",
        f"{row.date} {row.commit}",
    )


_BAR, _GAP = 0.29, 0.24
_Group = tuple[str, Published | None, list[tuple[Row, float]]]
_MARKS = (("npu", "D", "published, Atlas NPU"), ("reference", "o", "published, reference GPU"))
_TITLES = {
    MFU: "model FLOPs utilisation, %",
    "samples/s": "samples/s, all devices together",
    "frames/s": "frames/s, all devices together",
    "tokens/s/device": "tokens/s per device",
}


def plot(where: Path, model: str, path: Path | str) -> Path:
    """Draw a model's measured speeds as bars, the published ones as marks: a panel per unit, a group per recipe.

    A measured row stands in the panel of its own unit and, when its MFU is known, in the panel of MFU. Raises
    UserError when nothing is known of the model.
    """
    groups = _grouped(where, model)
    panels = _panels(groups)
    if not panels:
        known = {r.model for r in published(where) if r.model}
        raise UserError(f"model={model!r}: nothing published and nothing measured in {where}{nearest(model, known)}")
    heights = [sum(_slots(group) * _BAR + _GAP for group in panel) for _, panel in panels]
    head = 0.85
    figure = chart.figure(10.5, sum(heights) + 0.72 * len(panels) + head)
    grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    hardware = list(dict.fromkeys(r.hardware for _, rows in groups for r in rows))
    colours = {name: chart.COLOURS[i % len(chart.COLOURS)] for i, name in enumerate(hardware)}
    for (unit, panel), axes in zip(panels, grid[:, 0], strict=True):
        _draw_panel(axes, unit, panel, colours)
    _legend(figure, panels, colours)
    title = f"{model}: measured against published" if hardware else f"{model}: published, nothing measured yet"
    figure.text(0.012, 1 - 0.32 / figure.get_figheight(), title, fontsize=14, fontweight="bold", color=chart.INK)
    figure.tight_layout(rect=(0, 0, 0.995, 1 - (head - 0.1) / figure.get_figheight()), h_pad=1.2)
    return chart.write(figure, Path(path))


def _panels(groups: list[tuple[Published | None, list[Row]]]) -> list[tuple[str, list[_Group]]]:
    units = dict.fromkeys([MFU])
    units.update(dict.fromkeys(p.unit for p, _ in groups if p and p.unit))
    units.update(dict.fromkeys(r.unit for _, rows in groups for r in rows))
    panels: list[tuple[str, list[_Group]]] = []
    for unit in units:
        panel: list[_Group] = []
        for told, rows in groups:
            values = [(r, v) for r in rows if (v := in_unit(r, unit)) is not None]
            mark = told if told and told.unit == unit and (told.npu or told.reference) else None
            if values or mark:
                panel.append((rows[0].recipe if rows else told.label if told else "", mark, values))
        if panel:
            panels.append((unit, panel))
    return panels


def _slots(group: _Group) -> int:
    """Return how many lines a group takes: one for each measured row and one for what was published."""
    return len(group[2]) + (group[1] is not None)


def _draw_panel(axes: Any, unit: str, panel: list[_Group], colours: dict[str, str]) -> None:
    y, ticks, most = 0.0, [], 0.0
    for group in panel:
        _, mark, values = group
        ticks.append(y + _slots(group) * _BAR / 2)
        for row, value in values:
            axes.barh(y + _BAR / 2, value, height=0.8 * _BAR, color=colours[row.hardware])
            _say(axes, y + _BAR / 2, number(value), f"{row.devices} x {row.hardware}", chart.INK)
            most = max(most, value)
            y += _BAR
        if mark:
            _draw_mark(axes, y + _BAR / 2, mark, len(values))
            most = max(most, mark.npu or 0, mark.reference or 0)
            y += _BAR
        y += _GAP
    axes.set_yticks(ticks, [label for label, _, _ in panel])
    axes.set_ylim(y - _GAP / 2, -_GAP / 2)
    axes.set_xlim(0, most * 1.03)
    chart.style(axes, grid="x")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_title(_TITLES.get(unit, unit), loc="left", fontsize=10.5, color=chart.INK)


def _say(axes: Any, y: float, number: str, text: str, colour: str) -> None:
    """Write a line's value and what it was measured on in a column right of the panel, where no mark can cover it."""
    for x, part, side in ((1.075, number, "right"), (1.09, text, "left")):
        axes.text(x, y, part, transform=axes.get_yaxis_transform(), va="center", ha=side, fontsize=8.5, color=colour)


def _draw_mark(axes: Any, y: float, row: Published, bars: int) -> None:
    """Draw a published row as a stem with a mark at its end; a line leads from the NPU's mark across the bars above."""
    shown = [v for v in (row.npu, row.reference) if v]
    axes.plot([0, max(shown)], [y, y], color="#bdbdbd", linewidth=1.2, zorder=2)
    for name, shape, _ in _MARKS:
        value = getattr(row, name)
        if value:
            face = chart.INK if name == "npu" else "white"
            axes.plot(value, y, shape, ms=6, mfc=face, mec=chart.INK, zorder=4, clip_on=False)
    if bars and row.npu:
        axes.plot([row.npu] * 2, [y - (bars + 0.5) * _BAR, y], color=chart.INK, lw=1, ls=(0, (2, 2)), zorder=3)
    text = f"{row.devices} x {row.hardware}"
    if row.reference:
        text += f" (reference {number(row.reference)})"
    _say(axes, y, number(row.npu) if row.npu else "", text, chart.GREY)


def _legend(figure: Any, panels: list[tuple[str, list[_Group]]], colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in colours.items()]
    marks = [mark for _, panel in panels for _, mark, _ in panel if mark]
    for name, shape, text in _MARKS:
        if any(getattr(mark, name) for mark in marks):
            face = chart.INK if name == "npu" else "white"
            handles.append(Line2D([], [], ls="", marker=shape, ms=6, mfc=face, mec=chart.INK, label=text))
    where = (0.006, 1 - 0.38 / figure.get_figheight())
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=where, ncols=4, frameon=False, fontsize=9)
