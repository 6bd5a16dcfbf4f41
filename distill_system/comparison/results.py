"""Reads the folder of a comparison: every score, cost and curve of its finished runs.

N examples of a split, R bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_system.comparison.plan import Plan, read_plan, run_directory, run_key
from distill_system.errors import RunStateError
from distill_system.observe.metrics import MetricRow, read_metrics
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.summary import DISTANCES, read_evaluation
from distill_system.observe.timings import read_timings
from distill_system.standard_errors import FloatArray

DISTANCE_METRICS = {
    name if name in ("cross_entropy", "forward_kl") else f"{name}_distance": name
    for name in DISTANCES
}
"""Column's metric -> key among an evaluation's distances."""
HELD_OUT = "held_out"
"""The split of the columns that hold the distances."""

STAGE = "distill"
PEAK_MEMORY = "peak_memory_bytes"
SAMPLED_TOKENS = ("sampled_tokens/student", "sampled_tokens/teacher")
CURVE_PREFIXES = ("held_out/", "evaluation/")
REFERENCE_ROLES = {"teacher": "teacher", "before": "student before distillation"}
"""Evaluations of models that all runs share -> the name of their row in the tables."""


@dataclass(frozen=True, slots=True, order=True)
class Column:
    """A split and a metric: in_distribution and exact_match_greedy, or held_out and a distance."""

    split: str
    metric: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One column of one run, with the values that pair it with another run's.

    prompt_ids: [N]; empty for a score without examples (the distances).
    per_example_N: float64 [N], whose mean is the score; None for a score of the whole corpus.
    replicates_R: float64 [R], a corpus score on resampled examples; replicate r of two runs on the
    same prompts drew the same examples.
    """

    mean: float
    prompt_ids: tuple[str, ...] = ()
    per_example_N: FloatArray | None = None
    replicates_R: FloatArray | None = None


Curve = tuple[tuple[int, float], ...]
"""(step, value) of one metric in one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """One run whose student was evaluated after distillation.

    references: role (REFERENCE_ROLES) -> column -> score.
    costs: those of the distillation that were recorded: step_seconds, the wall clock of its steps
    alone, and stage_seconds, with evaluations; sampled_tokens, response tokens that student and
    teacher generated for training; learner_tokens, those that the learner read, of both streams;
    <kind of worker>_peak_memory_bytes, the largest peak of one worker.
    """

    objective: str
    seed: int
    step: int
    scores: Mapping[Column, Score]
    references: Mapping[str, Mapping[Column, float]]
    costs: Mapping[str, float]
    curves: Mapping[str, Curve]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything found in a comparison's folder.

    runs: objective -> seed -> run; an objective without finished runs has an empty mapping.
    problems: "objective/seed_0" -> why that run is left out, or differs from the plan.
    """

    plan: Plan
    runs: Mapping[str, Mapping[int, FinishedRun]]
    problems: Mapping[str, str]

    @property
    def columns(self) -> tuple[Column, ...]:
        """Every column of any run, in the order of first appearance."""
        runs = [run for found in self.runs.values() for run in found.values()]
        return tuple(dict.fromkeys(column for run in runs for column in run.scores))


def read_comparison(folder: Path) -> Comparison:
    """Read every run of the plan; one that failed, is missing or cannot be read is a problem.

    Raises: RunStateError if plan.json is missing or not a plan.
    """
    plan = read_plan(folder)
    runs: dict[str, dict[int, FinishedRun]] = {objective: {} for objective in plan.objectives}
    problems: dict[str, str] = {}
    for objective in plan.objectives:
        for seed in plan.seeds:
            key = run_key(objective, seed)
            try:
                run = _read_run(run_directory(folder, objective, seed), objective, seed)
            except RunStateError as error:
                # One damaged file must not hide the results of the other runs.
                problems[key] = f"left out, cannot be read: {error}"
                continue
            if run is not None:
                runs[objective][seed] = run
            problem = _find_problem(plan, key, run, planned_steps=plan.steps.get(objective))
            if problem is not None:
                problems[key] = problem
    return Comparison(plan=plan, runs=runs, problems=problems)


def _find_problem(
    plan: Plan, key: str, run: FinishedRun | None, *, planned_steps: int | None
) -> str | None:
    if key in plan.failures:
        return plan.failures[key]
    if run is None:
        return "left out: not finished, evaluations/after.json is missing"
    if planned_steps is not None and run.step != planned_steps:
        return f"evaluated after {run.step} steps, planned were {planned_steps}"
    return None


def _read_run(directory: RunDirectory, objective: str, seed: int) -> FinishedRun | None:
    after = read_evaluation(directory, "after")
    if after is None:
        return None
    rows = [row for row in read_metrics(directory) if row.stage == STAGE]
    references = {role: read_evaluation(directory, role) for role in REFERENCE_ROLES}
    try:
        return FinishedRun(
            objective=objective,
            seed=seed,
            step=int(after["step"]),
            scores=_collect_scores(after),
            references={
                role: {column: score.mean for column, score in _collect_scores(found).items()}
                for role, found in references.items()
                if found is not None
            },
            costs=_read_costs(directory, rows),
            curves=_collect_curves(rows),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RunStateError(
            f"{directory.evaluations_directory}: expected evaluations as write_evaluation writes "
            f"them ({error!r}); evaluate this run again"
        ) from error


def _collect_scores(evaluation: Mapping[str, Any]) -> dict[Column, Score]:
    """Every score that has a value; a score that was not finite is null in the file."""
    found = {
        Column(split, metric): _to_score(form, metric, float(estimate["mean"]))
        for split, form in evaluation["splits"].items()
        for metric, estimate in form["scores"].items()
        if estimate["mean"] is not None
    }
    for metric, stream in DISTANCE_METRICS.items():
        value = (evaluation["distances"] or {}).get(stream)
        if value is not None:
            found[Column(HELD_OUT, metric)] = Score(mean=float(value))
    return found


def _to_score(form: Mapping[str, Any], metric: str, mean: float) -> Score:
    return Score(
        mean=mean,
        prompt_ids=tuple(form["prompt_ids"]),
        per_example_N=_to_array(form["per_example"].get(metric)),
        replicates_R=_to_array(form["bootstrap"].get(metric)),
    )


def _to_array(values: Sequence[float] | None) -> FloatArray | None:
    return None if values is None else np.array(values, dtype=np.float64)


def _collect_curves(rows: Sequence[MetricRow]) -> dict[str, Curve]:
    """Metric -> its points, for the metrics that are measured on held-out data."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.metrics.items():
            if name.startswith(CURVE_PREFIXES) and value is not None:
                curves.setdefault(name, []).append((row.step, value))
    return {name: tuple(points) for name, points in curves.items()}


def _read_costs(run: RunDirectory, rows: Sequence[MetricRow]) -> dict[str, float]:
    """The costs of one run's distillation that were recorded; see FinishedRun.

    rows: the metrics of its distillation, each step once.
    Raises: RunStateError if timings.json exists and cannot be read.
    """
    costs = {
        "step_seconds": _sum(rows, "seconds/step"),
        "stage_seconds": read_timings(run).seconds.get(STAGE),
        "sampled_tokens": _sum(rows, *SAMPLED_TOKENS),
        "learner_tokens": _sum(rows, "learner/response_tokens"),
        **{f"{kind}_{PEAK_MEMORY}": peak for kind, peak in _find_peaks(rows).items()},
    }
    return {name: cost for name, cost in costs.items() if cost is not None}


def _find_peaks(rows: Sequence[MetricRow]) -> dict[str, float]:
    peaks: dict[str, float] = {}
    for row in rows:
        for name, value in row.metrics.items():
            kind, _, what = name.partition("/")
            if what == PEAK_MEMORY and value is not None:
                peaks[kind] = max(value, peaks.get(kind, 0.0))
    return peaks


def _sum(rows: Sequence[MetricRow], *metrics: str) -> float | None:
    found = [row.metrics.get(metric) for row in rows for metric in metrics]
    values = [value for value in found if value is not None]
    return sum(values) if values else None
