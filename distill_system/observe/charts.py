"""Points in; out an inline SVG that takes its colours, light or dark, from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

COLORS = (
    "ink",
    "grid",
    "teacher",
    "before",
    "after",
    "series-1",
    "series-2",
    "series-3",
    "series-4",
    "series-5",
    "series-6",
)
"""Names of the page's CSS variables that a chart may use, as var(--name)."""

# matplotlib takes no CSS variables: each is drawn in a hex colour of its own, which is replaced by
# the variable in the finished SVG.
_STAND_INS = {name: f"#0102{index:02x}" for index, name in enumerate(COLORS)}
LineStyle = Literal["measured", "noisy", "exact"]
LinePattern = Literal["solid", "dashed", "dotted"]
PATTERNS: tuple[LinePattern, ...] = ("solid", "dashed", "dotted")
_SIZE_INCHES = (5.2, 2.45)
_MAX_POINTS = 400
_SMOOTHED_POINTS = 20
_TICK_STEPS = [1, 2, 2.5, 5, 10]
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": _STAND_INS["grid"],
    "axes.labelcolor": _STAND_INS["ink"],
    "xtick.color": _STAND_INS["ink"],
    "ytick.color": _STAND_INS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _STAND_INS["grid"],
    "grid.linewidth": 0.7,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a chart.

    points: (step, value), a value of None leaves a gap.
    color: one of COLORS.
    errors: one standard error per point, drawn as bars, or with is_band as a band.
    style: "measured": few points, drawn with markers. "noisy": a point per step, drawn faint behind
    a smoothed line. "exact": a point per step, drawn as they are.
    """

    label: str
    points: Sequence[tuple[int, float | None]]
    color: str
    errors: Sequence[float | None] | None = None
    style: LineStyle = "noisy"
    pattern: LinePattern = "solid"
    is_band: bool = False


def draw_lines(lines: Sequence[Line]) -> str:
    """An <svg> element of the lines over steps; its only texts are numbers and "step"."""
    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        for line in lines:
            _draw_line(axes, line)
        axes.set_xlabel("step", loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=_TICK_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_TICK_STEPS))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(_format_tick))
        axes.margins(x=0.02, y=0.08)
        return _to_svg(figure)


def _draw_line(axes: Axes, line: Line) -> None:
    color = _STAND_INS[line.color]
    steps, values = _to_arrays(line.points)
    if line.errors is not None:
        _draw_errors(axes, line, np.array([error or 0.0 for error in line.errors]))
    marker = "o" if line.style == "measured" or len(values) == 1 else None
    kept = _thin(len(values))
    shown = values[kept]
    if line.style == "noisy" and len(values) >= _SMOOTHED_POINTS:
        axes.plot(steps[kept], shown, color=color, linewidth=0.8, alpha=0.3)
        shown = _smooth(steps, values, kept, window=len(values) // _SMOOTHED_POINTS)
    axes.plot(
        steps[kept],
        shown,
        color=color,
        linewidth=1.8,
        linestyle=line.pattern,
        marker=marker,
        markersize=4,
    )


def _draw_errors(axes: Axes, line: Line, errors: Any) -> None:
    color = _STAND_INS[line.color]
    steps, values = _to_arrays(line.points)
    if line.is_band:
        low, high = values - errors, values + errors
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    else:
        axes.errorbar(steps, values, yerr=errors, fmt="none", ecolor=color, elinewidth=1, alpha=0.6)


def _to_arrays(points: Sequence[tuple[int, float | None]]) -> tuple[Any, Any]:
    steps = np.array([step for step, _ in points], dtype=np.float64)
    values = np.array([np.nan if value is None else value for _, value in points], dtype=np.float64)
    return steps, values


def _smooth(steps: Any, values: Any, kept: Any, *, window: int) -> Any:
    """At each kept point, the value of a straight line fitted to the `window` points on each side.

    A running mean would flatten a steep start and follow the noise of the last few points.
    """
    smooth = np.full(len(kept), np.nan)
    for position, index in enumerate(kept):
        near = slice(max(0, index - window), index + window + 1)
        finite = np.isfinite(values[near])
        if finite.sum() > 2:
            line = np.polynomial.Polynomial.fit(steps[near][finite], values[near][finite], deg=1)
            smooth[position] = line(steps[index])
    return smooth


def _thin(num_points: int) -> Any:
    """Indices of about _MAX_POINTS evenly spaced points, the last point included."""
    stride = -(-num_points // _MAX_POINTS)
    return np.unique(np.append(np.arange(0, num_points, stride), num_points - 1))


def _format_tick(value: float, _position: int) -> str:
    return f"{value:,.6g}"


def _to_svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    _opening, _, body = text[text.index("<svg") :].partition(">")
    # Keep the picture alone: the page sets size and style, and an svg inside HTML needs no name
    # spaces, whose addresses would be the only ones on the page.
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*", "font-family: inherit", body)
    for name, stand_in in _STAND_INS.items():
        body = body.replace(stand_in, f"var(--{name})")
    width, height = (72 * inches for inches in _SIZE_INCHES)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{body}'
