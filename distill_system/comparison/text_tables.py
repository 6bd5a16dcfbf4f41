"""Renders a verdict as compare.md and compare.csv."""

from __future__ import annotations

import csv
import html
import io

from distill_system.comparison.tables import LEGEND, Table, build_tables, describe_budget
from distill_system.comparison.verdict import Cell, Summary, Verdict

SUMMARY_FIGURES = ("mean", "stderr", "num_seeds")


def write_markdown(verdict: Verdict) -> str:
    """The text of compare.md."""
    plan = verdict.comparison.plan
    parts = [f"# {plan.name}", f"{describe_budget(plan)}.", LEGEND]
    if verdict.comparison.problems:
        problems = verdict.comparison.problems.items()
        listed = [f"- `{key}`: {_to_one_line(problem)}" for key, problem in problems]
        parts.append("\n".join(["**Runs with problems:**", "", *listed]))
    for table in build_tables(verdict):
        parts += [f"## {table.title}", _to_markdown(table)]
    return "\n\n".join(parts) + "\n"


def write_csv(verdict: Verdict) -> str:
    """The text of compare.csv: a row per objective, a column per figure.

    Columns: objective, then `<split>/<metric>/` mean, stderr, num_seeds, p_sft, p_best_baseline,
    then `<cost>/` mean, stderr, num_seeds.  A figure that does not exist is empty.
    """
    costs = dict.fromkeys(name for found in verdict.costs.values() for name in found)
    header = ["objective"]
    for column in verdict.columns:
        name = f"{column.column.split}/{column.column.metric}"
        header += [f"{name}/{figure}" for figure in (*SUMMARY_FIGURES, "p_sft", "p_best_baseline")]
    header += [f"{cost}/{figure}" for cost in costs for figure in SUMMARY_FIGURES]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for objective in verdict.comparison.plan.objectives:
        row: list[object] = [objective]
        for column in verdict.columns:
            row += _cell_figures(column.cells.get(objective))
        for cost in costs:
            row += _summary_figures(verdict.costs[objective].get(cost))
        writer.writerow(row)  # the csv module writes None as an empty field
    return buffer.getvalue()


def _cell_figures(cell: Cell | None) -> list[float | None]:
    if cell is None:
        return [*_summary_figures(None), None, None]
    differences = (cell.against_sft, cell.against_best_baseline)
    return [
        *_summary_figures(cell.summary),
        *(each.p_value if each else None for each in differences),
    ]


def _summary_figures(summary: Summary | None) -> list[float | None]:
    if summary is None:
        return [None, None, 0]
    return [summary.mean, summary.stderr, summary.num_seeds]


def _to_markdown(table: Table) -> str:
    lines = ["| objective | " + " | ".join(map(_escape, table.header)) + " |"]
    lines.append("|---|" + "---:|" * len(table.header))
    for name, cells in table.rows:
        shown = [f"**{_escape(c.text)}**" if c.is_best else _escape(c.text) for c in cells]
        marked = [
            text + (f" {_escape(cell.marks)}" if cell.marks else "")
            for text, cell in zip(shown, cells, strict=True)
        ]
        lines.append(f"| {_escape(name)} | " + " | ".join(marked) + " |")
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Escape what Markdown would read as the end of a cell (|) or as emphasis (*)."""
    return text.replace("|", "\\|").replace("*", "\\*")


def _to_one_line(text: str) -> str:
    """One line, HTML escaped: Markdown would take the <pad> of an error message for a tag."""
    return html.escape(" ".join(text.split()), quote=False)
