"""One look for every chart: a plain figure, a quiet axis, numbers people can read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The Okabe-Ito colours: told apart by colour-blind readers and in grey print.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, GREY, GRID = "#222222", "#6b6b6b", "#e4e4e4"


def figure(width: float, height: float) -> Figure:
    """Return an empty figure of that many inches, drawn by Agg without a display or global state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("charts: matplotlib is not installed; pip install matplotlib") from None
    made = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(made)
    return made


def style(axes: Axes, grid: str = "y") -> None:
    """Keep the grid of one axis and drop the frame."""
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def write(made: Figure, path: Path) -> Path:
    """Write the figure in the format its suffix names, in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            made.savefig(file, format=path.suffix[1:])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def short(value: float, digits: int = 3, unit: str = "") -> str:
    """Return a number in ``digits`` figures with k, M, G or T: 12345 is ``12.3k``, in FLOP/s ``12.3 kFLOP/s``."""
    space = " " if unit else ""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.7 must become 1k, not 1000.
        if abs(value) >= limit * (1 - 0.5 * 10.0**-digits):
            return f"{_figures(value / limit, digits)}{space}{suffix}{unit}"
    return f"{_figures(value, digits)}{space}{unit}"


def plain(value: float) -> str:
    """Return a number in four figures, whole from a thousand on: ``0.1786`` or ``12,345``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _figures(value: float, digits: int) -> str:
    text = f"{value:.{digits}g}"
    return text if "e" in text else f"{float(text):.10g}"


def ticks(axis: Any) -> None:
    """Label an axis's ticks with ``short``."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
