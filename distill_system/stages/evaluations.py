"""Which of a run's evaluations are still to be made: those that are missing or lack a metric."""

from __future__ import annotations

from typing import Any, get_args

from distill_system.config import RunConfig
from distill_system.config.evaluation import MetricName
from distill_system.observe import RunDirectory
from distill_system.observe.summary import read_evaluation
from distill_system.run.checkpoints import CheckpointStore

LABELS = ("teacher", "before", "after")


def find_lacking(config: RunConfig, run: RunDirectory) -> list[str]:
    """Labels of the evaluations that are not there, or lack one of evaluation.metrics.

    An evaluation that holds no metric at all is of prompts without references: it lacks none.
    """
    lacking = []
    for label in LABELS:
        found = read_evaluation(run, label)
        measured = set() if found is None else _metrics_of(found)
        # The teacher's is made as the students' are: alone it is no reason to start workers.
        is_missing = found is None and label != "teacher"
        if is_missing or (measured and not measured.issuperset(config.evaluation.metrics)):
            lacking.append(label)
    return lacking


def wanted_metrics(config: RunConfig, run: RunDirectory) -> tuple[MetricName, ...]:
    """evaluation.metrics, and what earlier evaluations of the run hold besides: none is lost."""
    found = [read_evaluation(run, label) for label in LABELS]
    earlier = set().union(*(_metrics_of(evaluation) for evaluation in found if evaluation))
    kept = [name for name in get_args(MetricName) if name in earlier]
    return tuple(dict.fromkeys([*config.evaluation.metrics, *kept]))


def find_steps(config: RunConfig, run: RunDirectory) -> int:
    """Steps behind the exported student: fewer than distill.steps if the run stopped early."""
    after = read_evaluation(run, "after")
    if after is not None:
        return int(after["step"])
    newest = CheckpointStore(run.checkpoints_directory / "distill", keep=1).latest()
    return config.distill.steps if newest is None else newest.step


def describe_standing(run: RunDirectory) -> str:
    """What is there already, for a person who asked for it."""
    found = {label: read_evaluation(run, label) for label in LABELS}
    metrics = sorted(set().union(*(_metrics_of(each) for each in found.values() if each)))
    labels = ", ".join(label for label, each in found.items() if each)
    return (
        f"{labels} stand in {run.evaluations_directory} with {', '.join(metrics) or 'lengths'}. "
        "Other metrics: evaluation.metrics=[...]; other sets or another model: --model PATH"
    )


def _metrics_of(evaluation: dict[str, Any]) -> set[str]:
    """The metrics that some split has; those of lengths stand everywhere and do not count."""
    names = {
        name.rpartition("_")[0]
        for split in evaluation["splits"].values()
        for name in split["scores"]
    }
    return names & set(get_args(MetricName))
