"""What the text of a step looks like, by who wrote it, and how old it is: trajectories in, metrics
out.

Figures say whether a student collapses: text that is ever surer of itself, or ever more of the
same. A token's age is how many weight versions it is older than the student that learns from it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distill_system.errors import RecordError
from distill_system.observe.metrics import MetricRow
from distill_system.records import Author, Finish, Trajectory

AUTHORS = (Author.STUDENT, Author.TEACHER)
"""Rows of data have no engine that said how likely they are."""

GRAM_TOKENS = 3
"""Length of the pieces of text that are counted: trigrams."""


def text_metrics(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Figures of a step's responses, <author>_text/<figure>; none of an author who wrote nothing.

    mean_tokens and ended_share are the teacher's alone: the learner reports the student's.
    """
    every = list(trajectories)
    metrics: dict[str, float] = {}
    for author in AUTHORS:
        written = [trajectory for trajectory in every if trajectory.author is author]
        if written:
            metrics |= {f"{author}_text/{name}": v for name, v in _describe_text(author, written)}
    return metrics


def _describe_text(author: Author, written: Sequence[Trajectory]) -> list[tuple[str, float]]:
    num_tokens = sum(trajectory.num_response_tokens for trajectory in written)
    logprobs = sum(float(t.behaviour_logprobs.sum(dtype=np.float64)) for t in written)
    figures = [("entropy", -logprobs / num_tokens)]
    grams = _grams([trajectory.response_ids for trajectory in written])
    if grams.size:
        figures.append(("distinct_trigrams", _count_distinct(grams) / grams.size))
    if author is Author.TEACHER:
        ended = sum(trajectory.finish is Finish.STOP for trajectory in written)
        figures.append(("mean_tokens", num_tokens / len(written)))
        figures.append(("ended_share", ended / len(written)))
    return figures


def _count_distinct(grams: npt.NDArray[np.int64]) -> int:
    """How many different numbers there are; sorting is 20 times faster than numpy's unique."""
    ordered = np.sort(grams)
    return 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


def _grams(responses: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
    """A number for each trigram of each response: the same for the same three tokens."""
    grams = [np.empty(0, np.int64)]
    for response in responses:
        if response.size >= GRAM_TOKENS:
            ids = response.astype(np.int64)
            # 21 bits each: no vocabulary has two million tokens
            grams.append((ids[:-2] << 42) | (ids[1:-1] << 21) | ids[2:])
    return np.concatenate(grams)


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
    return _describe_ages(ages, max_staleness) | {DROPPED: float(num_dropped)}


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


def _describe_ages(ages: Counter[int], max_staleness: int) -> dict[str, float]:
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
