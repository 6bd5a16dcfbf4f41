"""Judges a comparison: the results of all runs in, a cell per objective and column out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distill_system.comparison.results import (
    DISTANCE_METRICS,
    REFERENCE_ROLES,
    Column,
    Comparison,
    FinishedRun,
    Score,
)
from distill_system.comparison.significance import Difference, compare_scores
from distill_system.evaluation.scores import METRICS, Direction
from distill_system.standard_errors import standard_error

AVERAGE = "average"
"""The split whose column is the mean over all splits that have the metric."""
REFERENCE_OBJECTIVE = "sft"
OURS = "ammd"
"""Prefix of the names of this project's own objectives; all others are baselines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The mean of a figure over seeds; stderr is None for one seed."""

    mean: float
    stderr: float | None
    num_seeds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One objective under one column."""

    summary: Summary
    per_seed: Mapping[int, float]
    is_best: bool
    against_sft: Difference | None
    against_best_baseline: Difference | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnVerdict:
    """One column of the tables.

    cells: objective -> cell; objectives without a score there are missing.
    references: role -> its score, averaged over runs.
    """

    column: Column
    direction: Direction
    best_baseline: str | None
    cells: Mapping[str, Cell]
    references: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One step of a curve over seeds."""

    step: int
    summary: Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The results of a comparison.

    columns: grouped by metric, the average over splits first.
    costs: objective -> cost -> figure.  curves: metric -> objective -> points.
    """

    comparison: Comparison
    columns: tuple[ColumnVerdict, ...]
    costs: Mapping[str, Mapping[str, Summary]]
    curves: Mapping[str, Mapping[str, tuple[Point, ...]]]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric, in the order of the columns."""
        return tuple(dict.fromkeys(verdict.column.metric for verdict in self.columns))

    def of_metric(self, metric: str) -> tuple[ColumnVerdict, ...]:
        """The columns of one metric, the average first."""
        return tuple(verdict for verdict in self.columns if verdict.column.metric == metric)


def better_direction(metric: str) -> Direction:
    """Which way a column's metric is better, as it declares; neither for one that is not ours.

    metric: a distance, or `<name>_<decoding>` of evaluation.scores.METRICS.
    """
    if metric in DISTANCE_METRICS:
        return Direction.LOWER
    return METRICS.get(metric.rpartition("_")[0], Direction.NEITHER)


def reach_verdict(comparison: Comparison) -> Verdict:
    """Compare every objective with SFT and with the best baseline, column by column."""
    metrics = dict.fromkeys(column.metric for column in comparison.columns)
    columns = []
    for metric in metrics:
        parts = [column for column in comparison.columns if column.metric == metric]
        if len(parts) > 1:
            columns.append(_judge(comparison, Column(AVERAGE, metric), parts))
        columns += [_judge(comparison, column, [column]) for column in parts]
    return Verdict(
        comparison=comparison,
        columns=tuple(columns),
        costs={name: _summarise_costs(runs.values()) for name, runs in comparison.runs.items()},
        curves=_summarise_curves(comparison),
    )


def summarise(values: Sequence[float]) -> Summary:
    """Mean and standard error of one value per seed."""
    mean = math.fsum(values) / len(values)
    return Summary(mean=mean, stderr=standard_error(values), num_seeds=len(values))


def _judge(comparison: Comparison, column: Column, parts: Sequence[Column]) -> ColumnVerdict:
    """One column; its score is the mean over its parts."""
    scores = {name: _collect(runs, parts) for name, runs in comparison.runs.items()}
    scores = {name: found for name, found in scores.items() if found}
    per_seed = {
        name: {seed: _mean(score.mean for score in row) for seed, row in found.items()}
        for name, found in scores.items()
    }
    summaries = {name: summarise(list(values.values())) for name, values in per_seed.items()}
    direction = better_direction(column.metric)
    best_mean = max((direction * s.mean for s in summaries.values()), default=None)
    best_baseline = _find_best_baseline(summaries, direction)

    def against(name: str, other: str | None) -> Difference | None:
        if direction == 0 or other is None or other not in scores or name == other:
            return None
        return compare_scores(scores[name], scores[other])

    cells = {
        name: Cell(
            summary=summaries[name],
            per_seed=per_seed[name],
            is_best=direction != 0 and direction * summaries[name].mean == best_mean,
            against_sft=against(name, REFERENCE_OBJECTIVE),
            against_best_baseline=against(name, best_baseline),
        )
        for name in scores
    }
    return ColumnVerdict(
        column=column,
        direction=direction,
        best_baseline=best_baseline,
        cells=cells,
        references=_average_references(comparison, parts),
    )


def _collect(
    runs: Mapping[int, FinishedRun], parts: Sequence[Column]
) -> dict[int, tuple[Score, ...]]:
    """Seed -> its scores of all parts; seeds that lack one of them are left out."""
    return {
        seed: tuple(run.scores[part] for part in parts)
        for seed, run in runs.items()
        if all(part in run.scores for part in parts)
    }


def _find_best_baseline(summaries: Mapping[str, Summary], direction: int) -> str | None:
    """The best mean among the baselines with the most seeds: fewer seeds could just be lucky."""
    baselines = {name: s for name, s in summaries.items() if not name.startswith(OURS)}
    if direction == 0 or not baselines:
        return None
    most = max(summary.num_seeds for summary in baselines.values())
    whole = {name: s for name, s in baselines.items() if s.num_seeds == most}
    return max(whole, key=lambda name: direction * whole[name].mean)


def _average_references(comparison: Comparison, parts: Sequence[Column]) -> dict[str, float]:
    averages = {}
    for role in REFERENCE_ROLES:
        values = [
            _mean(run.references[role][part] for part in parts)
            for runs in comparison.runs.values()
            for run in runs.values()
            if all(part in run.references.get(role, {}) for part in parts)
        ]
        if values:
            averages[role] = _mean(values)
    return averages


def _summarise_costs(runs: Iterable[FinishedRun]) -> dict[str, Summary]:
    named = [{"steps": float(run.step), **run.costs} for run in runs]
    names = dict.fromkeys(name for costs in named for name in costs)
    return {name: summarise([costs[name] for costs in named if name in costs]) for name in names}


def _summarise_curves(comparison: Comparison) -> dict[str, dict[str, tuple[Point, ...]]]:
    """Metric -> objective -> mean over the seeds that have that step."""
    curves: dict[str, dict[str, tuple[Point, ...]]] = {}
    for objective, runs in comparison.runs.items():
        for metric in dict.fromkeys(name for run in runs.values() for name in run.curves):
            values: dict[int, list[float]] = {}
            for run in runs.values():
                for step, value in run.curves.get(metric, ()):
                    values.setdefault(step, []).append(value)
            points = (Point(step=step, summary=summarise(values[step])) for step in sorted(values))
            curves.setdefault(metric, {})[objective] = tuple(points)
    return curves


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
