"""Renders a verdict as compare.html, in the style of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import Any

import yaml

from distill_system.comparison.plan import Plan
from distill_system.comparison.significance import Difference
from distill_system.comparison.tables import (
    LEGEND,
    build_tables,
    count_digits,
    describe_budget,
    format_difference,
    format_summary,
    title_metric,
)
from distill_system.comparison.verdict import (
    OURS,
    REFERENCE_OBJECTIVE,
    ColumnVerdict,
    Point,
    Verdict,
)
from distill_system.observe.charts import PATTERNS, Line
from distill_system.observe.curves import SERIES, Chart, draw_chart
from distill_system.observe.pages import render_page


def write_page(verdict: Verdict) -> str:
    """The text of compare.html."""
    plan = verdict.comparison.plan
    metrics = find_headline_metrics(verdict)
    headline_columns = [column for metric in metrics for column in verdict.of_metric(metric)]
    values = {
        "plan": plan,
        "budget": describe_budget(plan),
        "legend": LEGEND,
        "headlines": write_headlines(verdict, metrics),
        "problems": verdict.comparison.problems,
        "bars": [_draw_bars(column, plan) for column in headline_columns if column.cells],
        "intervals": [card for column in headline_columns if (card := _draw_intervals(column))],
        "reference": REFERENCE_OBJECTIVE,
        "tables": build_tables(verdict),
        "sections": _draw_sections(verdict, metrics),
        "config": yaml.safe_dump(plan.config, sort_keys=False, allow_unicode=True),
    }
    return render_page("comparison/compare.html", values)


def find_headline_metrics(verdict: Verdict) -> tuple[str, ...]:
    """The first of evaluation.metrics, greedy and sampled; or else the first score found."""
    configured = verdict.comparison.plan.config.get("evaluation", {}).get("metrics", ())
    judged = {column.column.metric for column in verdict.columns if column.direction > 0}
    known = [metric for metric in verdict.metrics if metric in judged]
    names = [*configured, *(metric.rpartition("_")[0] for metric in known)]
    for name in names:
        found = tuple(m for m in (f"{name}_greedy", f"{name}_sampled") if m in known)
        if found:
            return found
    return ()


def write_headlines(verdict: Verdict, metrics: Sequence[str]) -> list[str]:
    """One line per metric: the best AMMD objective against SFT and against the best baseline."""
    sentences = []
    for metric in metrics:
        column = verdict.of_metric(metric)[0]
        ours = [name for name in column.cells if name.startswith(OURS)]
        if not ours:
            continue
        best = max(ours, key=lambda name: column.cells[name].summary.mean)
        cell = column.cells[best]
        compared: Mapping[str, Difference | None] = {
            REFERENCE_OBJECTIVE: cell.against_sft,
            f"{column.best_baseline} (best baseline)": cell.against_best_baseline,
        }
        words = [
            f"{format_difference(difference)} against {name}"
            for name, difference in compared.items()
            if difference is not None
        ]
        start = f"{title_metric(metric)}, {_title_split(column)}: {best} {cell.summary.mean:.1f}"
        sentences.append("; ".join([start, *words]))
    return sentences


def _draw_bars(column: ColumnVerdict, plan: Plan) -> dict[str, Any]:
    """Bars from zero, scaled so that the longest fills the card together with its error.

    Of each, end and error are percentages of the card's width.
    """
    metric = column.column.metric
    reach = max(c.summary.mean + (c.summary.stderr or 0.0) for c in column.cells.values()) or 1.0
    bars = [
        {
            "name": name,
            "color": "after" if name.startswith(OURS) else "before",
            "end": 100 * cell.summary.mean / reach,
            "error": 100 * (cell.summary.stderr or 0.0) / reach,
            "text": format_summary(cell.summary, count_digits(metric), len(plan.seeds)),
        }
        for name, cell in column.cells.items()
    ]
    return {"title": f"{title_metric(metric)} · {_title_split(column)}", "rows": bars}


def _draw_intervals(column: ColumnVerdict) -> dict[str, Any]:
    """Differences from SFT with their 95% intervals; empty if there are none.

    low, middle, high and zero (no difference) are positions in percent of the width.
    """
    found = {
        name: (cell.against_sft, cell.against_sft.interval)
        for name, cell in column.cells.items()
        if cell.against_sft is not None and cell.against_sft.interval is not None
    }
    if not found:
        return {}
    low = min(0.0, *(interval[0] for _, interval in found.values()))
    high = max(0.0, *(interval[1] for _, interval in found.values()))
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return 100 * (value - low) / width

    rows = [
        {
            "name": name,
            "kind": _kind(difference, column.direction),
            "low": place(interval[0]),
            "middle": place(difference.difference),
            "high": place(interval[1]),
            "text": format_difference(difference),
        }
        for name, (difference, interval) in found.items()
    ]
    title = f"{title_metric(column.column.metric)} · {_title_split(column)}"
    return {"title": title, "rows": rows, "zero": place(0.0)}


def _draw_sections(verdict: Verdict, metrics: Sequence[str]) -> list[tuple[str, list[Chart]]]:
    """Title and charts of each section that has any."""
    wanted = {
        "Distances to the teacher": ("held_out/",),
        "Scores during training": tuple(metrics),
    }
    sections = []
    for title, parts in wanted.items():
        charts = [
            chart
            for metric, curves in verdict.curves.items()
            if metric.startswith(parts) or metric.endswith(parts)
            for chart in _draw_curve(metric, curves, verdict.comparison.plan.objectives)
        ]
        if charts:
            sections.append((title, charts))
    return sections


def _draw_curve(
    metric: str, curves: Mapping[str, Sequence[Point]], objectives: Sequence[str]
) -> list[Chart]:
    kept = {objective: _shared_steps(points) for objective, points in curves.items()}
    if max(len(points) for points in kept.values()) < 3:
        return []
    # Six colours, then the same dashed, then dotted. Assigned in the plan's order, so that an
    # objective has the same look in every chart.
    looks = cycle((color, pattern) for pattern, color in product(PATTERNS, SERIES))
    lines = [
        Line(
            label=objective,
            points=[(point.step, point.summary.mean) for point in kept.get(objective, ())],
            errors=[point.summary.stderr for point in kept.get(objective, ())],
            color=color,
            pattern=pattern,
            style="measured",
            is_band=True,
        )
        for objective, (color, pattern) in zip(objectives, looks, strict=False)
    ]
    room, *split, name = metric.split("/")
    where = [] if room == "held_out" else [part.replace("_", " ") for part in split]
    title = " · ".join([title_metric(name), *where])
    return draw_chart(title, "mean over seeds, band of one standard error", lines)


def _shared_steps(points: Sequence[Point]) -> list[Point]:
    """The points over the largest number of seeds; a mean over fewer seeds would jump there."""
    most = max(point.summary.num_seeds for point in points)
    return [point for point in points if point.summary.num_seeds == most]


def _title_split(column: ColumnVerdict) -> str:
    return column.column.split.replace("_", " ")


def _kind(difference: Difference, direction: int) -> str:
    """The CSS class of a difference: up, down, or unclear if it is not significant."""
    if not difference.is_significant:
        return "unclear"
    return "up" if difference.difference * direction > 0 else "down"
