"""Writes compare.json, compare.md, compare.csv and compare.html into a comparison's folder."""

from __future__ import annotations

import csv
import html
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill_system.comparison.capacity import fit_laws
from distill_system.comparison.page import write_page
from distill_system.comparison.results import read_comparison
from distill_system.comparison.significance import LEVEL
from distill_system.comparison.tables import LEGEND, Table, build_tables, describe_budget
from distill_system.comparison.verdict import Cell, ColumnVerdict, Summary, Verdict, reach_verdict
from distill_system.observe.run_directory import write_json, write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonFiles:
    """The files that write_comparison wrote, and the verdict in them."""

    json_path: Path
    markdown_path: Path
    csv_path: Path
    html_path: Path
    verdict: Verdict


def write_comparison(folder: Path) -> ComparisonFiles:
    """Compare the finished runs of a plan; the files name those that have not finished.

    folder: holds plan.json and the runs `<objective>/seed_<k>/`; the files are written beside
        plan.json.
    Raises: RunStateError if plan.json is missing or not a plan.
    """
    verdict = reach_verdict(read_comparison(folder))
    files = ComparisonFiles(
        json_path=folder / "compare.json",
        markdown_path=folder / "compare.md",
        csv_path=folder / "compare.csv",
        html_path=folder / "compare.html",
        verdict=verdict,
    )
    write_json(files.json_path, to_json(verdict))
    write_text(files.markdown_path, write_markdown(verdict))
    write_text(files.csv_path, write_csv(verdict))
    write_text(files.html_path, write_page(verdict))
    return files


def to_json(verdict: Verdict) -> dict[str, Any]:
    """compare.json.

    Returns: name, objectives, seeds, budget, budget_value, steps: the plan's.
        problems["objective/seed_0"]: why that run is left out, or differs from the plan.
        level: the p-value below which a difference is significant.
        size_ratios: the plan's.  capacity[metric]: the fields of CapacityLaw and holds_published.
        scores[metric][split]: direction (1 higher is better, -1 lower, 0 neither), best_baseline,
        references[role] and objectives[name]: mean, stderr (over seeds), num_seeds,
        per_seed[seed], is_best, against_sft and against_best_baseline (the fields of Difference,
        and is_significant; null against itself or if nothing can be compared).  The split
        "average" is the mean over all splits.  The distances have the split "held_out".
        costs[objective][cost]: mean, stderr, num_seeds.
        curves[metric][objective]: one {step, mean, stderr, num_seeds} per measured step.
    """
    plan = verdict.comparison.plan
    return {
        "name": plan.name,
        "objectives": plan.objectives,
        "seeds": plan.seeds,
        "budget": plan.budget,
        "budget_value": plan.budget_value,
        "steps": plan.steps,
        "problems": verdict.comparison.problems,
        "level": LEVEL,
        "size_ratios": plan.size_ratios,
        "capacity": {
            metric: {**asdict(law), "holds_published": law.holds_published}
            for metric, law in fit_laws(verdict).items()
        },
        "scores": {
            metric: {c.column.split: _column_form(c) for c in verdict.of_metric(metric)}
            for metric in verdict.metrics
        },
        "costs": {
            objective: {name: asdict(summary) for name, summary in found.items()}
            for objective, found in verdict.costs.items()
        },
        "curves": {
            metric: {
                objective: [{"step": point.step, **asdict(point.summary)} for point in points]
                for objective, points in curves.items()
            }
            for metric, curves in verdict.curves.items()
        },
    }


def _column_form(column: ColumnVerdict) -> dict[str, Any]:
    return {
        "direction": column.direction,
        "best_baseline": column.best_baseline,
        "references": column.references,
        "objectives": {name: _cell_form(cell) for name, cell in column.cells.items()},
    }


def _cell_form(cell: Cell) -> dict[str, Any]:
    differences = {
        "against_sft": cell.against_sft,
        "against_best_baseline": cell.against_best_baseline,
    }
    return {
        **asdict(cell.summary),
        "per_seed": {str(seed): value for seed, value in cell.per_seed.items()},
        "is_best": cell.is_best,
        **{
            name: difference and {**asdict(difference), "is_significant": difference.is_significant}
            for name, difference in differences.items()
        },
    }


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
