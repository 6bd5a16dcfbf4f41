"""Writes compare.json, compare.md, compare.csv and compare.html into a comparison's folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill_system.comparison.page import write_page
from distill_system.comparison.results import read_comparison
from distill_system.comparison.significance import LEVEL
from distill_system.comparison.text_tables import write_csv, write_markdown
from distill_system.comparison.verdict import Cell, ColumnVerdict, Verdict, reach_verdict
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
