"""How old the text is that a step learns from: its trajectories in, metrics out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from distill_system.errors import RecordError
from distill_system.observe.metrics import MetricRow
from distill_system.records import Author, Trajectory

SHARE = "staleness/share_"
OLDER = "older"
TOKENS = "staleness/tokens"
DROPPED = "staleness/dropped"


def staleness_metrics(
    trajectories: Iterable[Trajectory],
    learner_version: int,
    *,
    max_staleness: int = 0,
    num_dropped: int = 0,
) -> dict[str, float]:
    """Ages of the student's response tokens that a step learns from; every token counts once.

    trajectories: the step's; those that the student did not write have no age and are left out.
    learner_version: version of the weights that the step begins with; a token's age is this
        minus the version that sampled it.
    max_staleness: S; each age 0..S has a share of its own, all older tokens have one together.
    num_dropped: trajectories that were dropped as too old since the last step.
    Returns: staleness/dropped; if there are tokens of the student also learner/mean_staleness,
        learner/max_staleness, staleness/share_<age>, staleness/share_older and staleness/tokens.
    Raises: RecordError if a token is newer than the learner, or the student's and without a
        version.
    """
    ages: Counter[int] = Counter()
    for trajectory in trajectories:
        if trajectory.author is Author.STUDENT:
            _count_ages(ages, trajectory, learner_version)
    return _describe(ages, max_staleness) | {DROPPED: float(num_dropped)}


def _count_ages(ages: Counter[int], trajectory: Trajectory, learner_version: int) -> None:
    # The student's text must say which versions wrote it: without any, `newest` is refused below.
    newest = max((span.version for span in trajectory.weight_versions), default=math.inf)
    if newest > learner_version:
        raise RecordError(
            f"record {trajectory.trajectory_id!r}: expected tokens of student versions up to the "
            f"learner's, {learner_version}, got {trajectory.weight_versions}"
        )
    for span in trajectory.weight_versions:
        ages[learner_version - span.version] += span.end - span.start


def _describe(ages: Counter[int], max_staleness: int) -> dict[str, float]:
    total = ages.total()
    if total == 0:
        return {}
    shares = {f"{SHARE}{age}": ages[age] / total for age in range(max_staleness + 1)}
    older = sum(count for age, count in ages.items() if age > max_staleness) / total
    return {
        "learner/mean_staleness": sum(age * count for age, count in ages.items()) / total,
        "learner/max_staleness": float(max(age for age, count in ages.items() if count)),
        **shares,
        f"{SHARE}{OLDER}": older,
        TOKENS: float(total),
    }


def summarise_staleness(rows: Sequence[MetricRow]) -> dict[str, Any] | None:
    """The ages over a whole run, weighted by tokens; None if it has no such metrics.

    Returns: mean, max, shares (age, or "older" -> share of tokens, 0..1), dropped.
    """
    measured = [row.metrics for row in rows if row.metrics.get(TOKENS)]
    total = sum(metrics[TOKENS] or 0.0 for metrics in measured)
    if total == 0:
        return None

    def mean(name: str) -> float:
        return sum((row.get(name) or 0.0) * (row[TOKENS] or 0.0) for row in measured) / total

    names = {name for row in measured for name in row if name.startswith(SHARE)}
    # By length first: 9 before 10, and "older" last.
    ages = sorted((name.removeprefix(SHARE) for name in names), key=lambda age: (len(age), age))
    return {
        "mean": mean("learner/mean_staleness"),
        "max": max(row.get("learner/max_staleness") or 0.0 for row in measured),
        "shares": {age: mean(f"{SHARE}{age}") for age in ages},
        "dropped": int(sum(row.metrics.get(DROPPED) or 0.0 for row in rows)),
    }
