"""Builds the tables of a verdict, as texts that Markdown and the page both show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distill_system.comparison.capacity import PUBLISHED_RATIO, CapacityLaw, fit_laws
from distill_system.comparison.plan import Plan
from distill_system.comparison.results import REFERENCE_ROLES
from distill_system.comparison.significance import Difference
from distill_system.comparison.verdict import Cell, ColumnVerdict, Summary, Verdict
from distill_system.observe.formats import METRIC_TITLES, format_metric, format_signed, format_value

GAIN_ON_SFT, GAIN_ON_BASELINE, LOSS_TO_SFT = "*", "†", "↓"
LEGEND = (
    "Mean ± standard error over seeds; the best of each column is bold. "
    f"{GAIN_ON_SFT} better than sft, {LOSS_TO_SFT} worse than sft, {GAIN_ON_BASELINE} better than "
    "the best baseline (named in the last row), each with p < 0.05, paired over seeds and "
    "examples. No correction is made for the number of comparisons: of twenty differences that "
    "chance alone makes, one is marked."
)
DISTANCE_DIGITS = 4
DISTANCE_TITLES = {
    "cross_entropy": "Held-out cross-entropy, nats per token of the teacher's text",
    "forward_kl": "Held-out KL(teacher || student), nats per token of the teacher's text",
    "on_policy_distance": "On-policy distance",
    "off_policy_distance": "Off-policy distance",
}
COSTS: dict[str, tuple[str, float, int]] = {
    "steps": ("steps", 1, 0),
    "step_seconds": ("seconds of steps", 1, 1),
    "stage_seconds": ("seconds with evaluations", 1, 1),
    "sampled_tokens": ("tokens sampled by both models", 1, 0),
    "learner_tokens": ("tokens learned from", 1, 0),
    "learner_peak_memory_bytes": ("peak memory of a learner, MiB", 2**20, 0),
}
"""Cost -> its title, the divisor for its unit, and digits."""


@dataclass(frozen=True, slots=True)
class TableCell:
    """What one cell shows.  marks: such as GAIN_ON_SFT; note: the differences behind the marks."""

    text: str
    is_best: bool = False
    marks: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a header, and rows: a name and its cells."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[TableCell, ...]], ...]


def build_tables(verdict: Verdict) -> list[Table]:
    """One table per metric, with a column for each split, one of teachers' sizes where those are
    compared, and one of the costs."""
    tables = [_metric_table(verdict, metric) for metric in verdict.metrics]
    if laws := fit_laws(verdict):
        tables.append(_capacity_table(laws))
    return [*tables, _cost_table(verdict)]


def describe_budget(plan: Plan) -> str:
    """A sentence on the runs and their equal budget."""
    what = {
        "updates": "{:,.0f} student updates",
        "sampled_tokens": "{:,.0f} tokens sampled by both models",
        "seconds": "{:,.0f} seconds of wall clock",
    }[plan.budget]
    compared = "teachers" if plan.size_ratios else "objectives"
    runs = f"{len(plan.objectives)} {compared}, {len(plan.seeds)} seeds"
    return f"{runs}; equal budget: {what.format(plan.budget_value)} per run"


def title_metric(metric: str) -> str:
    """A metric's name for people."""
    if metric.rpartition("_")[0] in METRIC_TITLES:
        return format_metric(metric)
    return DISTANCE_TITLES.get(metric, metric.replace("_", " "))


def _metric_table(verdict: Verdict, metric: str) -> Table:
    columns = verdict.of_metric(metric)
    rows = [
        (objective, tuple(_score_cell(verdict, column, objective) for column in columns))
        for objective in verdict.comparison.plan.objectives
    ]
    digits = count_digits(metric)
    rows += [
        (
            title,
            tuple(
                TableCell(format_value(column.references.get(role), digits)) for column in columns
            ),
        )
        for role, title in REFERENCE_ROLES.items()
        if any(role in column.references for column in columns)
    ]
    if any(column.best_baseline for column in columns):
        names = tuple(TableCell(column.best_baseline or "") for column in columns)
        rows.append(("best baseline", names))
    header = tuple(column.column.split.replace("_", " ") for column in columns)
    directions = {1: "higher is better", -1: "lower is better", 0: "neither is better"}
    title = f"{title_metric(metric)} ({directions[columns[0].direction]})"
    return Table(title, header, tuple(rows))


def _score_cell(verdict: Verdict, column: ColumnVerdict, objective: str) -> TableCell:
    cell = column.cells.get(objective)
    num_seeds = len(verdict.comparison.plan.seeds)
    if cell is None:
        return TableCell(f"{format_value(None)} (n=0)")
    digits = count_digits(column.column.metric)
    return TableCell(
        format_summary(cell.summary, digits, num_seeds),
        is_best=cell.is_best,
        marks=_mark(cell, column.direction),
        note=_describe(cell, column.best_baseline, digits),
    )


def _mark(cell: Cell, direction: int) -> str:
    on_sft = _significant_sign(cell.against_sft) * direction
    on_baseline = _significant_sign(cell.against_best_baseline) * direction
    marks = {1: GAIN_ON_SFT, -1: LOSS_TO_SFT, 0: ""}[on_sft]
    return marks + (GAIN_ON_BASELINE if on_baseline > 0 else "")


def _significant_sign(difference: Difference | None) -> int:
    if difference is None or not difference.is_significant:
        return 0
    return 1 if difference.difference > 0 else -1


def _describe(cell: Cell, best_baseline: str | None, digits: int) -> str:
    compared: Mapping[str, Difference | None] = {
        "sft": cell.against_sft,
        f"{best_baseline}, the best baseline": cell.against_best_baseline,
    }
    found = [
        f"against {name}: {describe_difference(difference, digits)}"
        for name, difference in compared.items()
        if difference is not None
    ]
    return "; ".join(found)


def format_difference(difference: Difference, digits: int = 1) -> str:
    """Difference, 95% interval and p-value; the last two if they are known."""
    words = format_signed(difference.difference, digits)
    if difference.interval is not None:
        low, high = (format_signed(bound, digits) for bound in difference.interval)
        words += f" [{low}, {high}]"
    if difference.p_value is not None:
        words += f", p = {difference.p_value:.2g}"
    return words


def describe_difference(difference: Difference, digits: int) -> str:
    """format_difference, with its basis and the number of seeds."""
    words = format_difference(difference, digits)
    seeds = f"{difference.num_seeds} seed{'s' if difference.num_seeds > 1 else ''}"
    return f"{words} (chance of {difference.basis}; {seeds})"


def format_summary(summary: Summary, digits: int, num_seeds: int) -> str:
    """28.5 ± 0.4, and the number of seeds if some are missing."""
    words = f"{summary.mean:,.{digits}f}"
    if summary.stderr is not None:
        words += f" ± {summary.stderr:,.{digits}f}"
    return words if summary.num_seeds == num_seeds else f"{words} (n={summary.num_seeds})"


def _capacity_table(laws: Mapping[str, CapacityLaw]) -> Table:
    header = ("best", "95 % of replicates", f"holds {PUBLISHED_RATIO}", "among those tried", "R2")
    rows = []
    for metric, law in laws.items():
        interval, holds = law.interval, law.holds_published
        texts = (
            format_value(law.best_ratio, 2),
            "none" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}",
            "unknown" if holds is None else "yes" if holds else "no",
            "yes" if law.is_inside else "no",
            f"{law.r_squared:.2f}",
        )
        rows.append((title_metric(metric), tuple(map(TableCell, texts))))
    title = "Teacher's parameters over the student's: the best by a parabola in their logarithm"
    return Table(title, header, tuple(rows))


def _cost_table(verdict: Verdict) -> Table:
    plan = verdict.comparison.plan
    recorded = [cost for cost in COSTS if any(cost in found for found in verdict.costs.values())]
    lowest = {
        cost: min(found[cost].mean for found in verdict.costs.values() if cost in found)
        for cost in recorded
        if cost != "steps"
    }
    rows = []
    for objective in plan.objectives:
        found = verdict.costs[objective]
        cells = tuple(
            _cost_cell(cost, found.get(cost), lowest.get(cost), len(plan.seeds))
            for cost in recorded
        )
        rows.append((objective, cells))
    header = tuple(COSTS[cost][0] for cost in recorded)
    return Table("Costs of one run (the lowest is bold)", header, tuple(rows))


def _cost_cell(
    cost: str, summary: Summary | None, lowest: float | None, num_seeds: int
) -> TableCell:
    if summary is None:
        return TableCell(format_value(None))
    _, unit, digits = COSTS[cost]
    stderr = None if summary.stderr is None else summary.stderr / unit
    scaled = Summary(mean=summary.mean / unit, stderr=stderr, num_seeds=summary.num_seeds)
    return TableCell(format_summary(scaled, digits, num_seeds), is_best=summary.mean == lowest)


def count_digits(metric: str) -> int:
    """Decimals of a metric: distances are small numbers."""
    return DISTANCE_DIGITS if metric in DISTANCE_TITLES else 1
