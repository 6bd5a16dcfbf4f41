"""Whether the student's text collapses: metrics of steps in, what to tell of them out.

Each signal is a mean over the last steps, held against two references: the run's own first steps,
and what the teacher writes meanwhile. Text that moves away from its beginning towards the teacher's
is what a distillation is for; text that leaves both is told of.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distill_system.config.distill import CollapseConfig

MEASURED_WINDOW = (1, 2)
"""Measurements that are averaged, at first and lately, of what is measured on held-out data: the
same prompts each time, so that few of them say enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One way to collapse.

    name: of the metric collapse/<name>.  metric, teacher: the student's figure, and the teacher's
    own where there is one.  key: of the limit in distill.collapse.  rises: whether it is too much,
    and not too little, that is told of.  title: for people.
    """

    name: str
    metric: str
    key: str
    title: str
    teacher: str = ""
    rises: bool = False

    @property
    def is_measured(self) -> bool:
        """Whether it comes with measurements on held-out data alone."""
        return self.metric.startswith("held_out/")


_LENGTH = "mean length of its responses in tokens"
_ENTROPY = "entropy of its text in nats per token"

SIGNALS = (
    Signal(
        name="short",
        metric="learner/mean_student_response_tokens",
        teacher="teacher_text/mean_tokens",
        key="min_length",
        title=_LENGTH,
    ),
    Signal(
        name="long",
        metric="learner/mean_student_response_tokens",
        teacher="teacher_text/mean_tokens",
        key="max_length",
        title=_LENGTH,
        rises=True,
    ),
    Signal(
        name="unended",
        metric="learner/student_ended_share",
        teacher="teacher_text/ended_share",
        key="min_ended_share",
        title="share of its responses that end by themselves",
    ),
    Signal(
        name="sure",
        metric="student_text/entropy",
        teacher="teacher_text/entropy",
        key="min_entropy",
        title=_ENTROPY,
    ),
    Signal(
        name="random",
        metric="student_text/entropy",
        teacher="teacher_text/entropy",
        key="max_entropy",
        title=_ENTROPY,
        rises=True,
    ),
    Signal(
        name="repetitive",
        metric="student_text/distinct_trigrams",
        teacher="teacher_text/distinct_trigrams",
        key="min_distinct",
        title="share of different trigrams in its text",
    ),
    Signal(
        name="apart",
        metric="held_out/top_token_overlap",
        key="min_overlap",
        title="share of the most likely tokens that it has in common with the teacher",
    ),
)


@dataclass(slots=True)
class _Course:
    """What a metric was at first, and lately: means over so many finite values each."""

    num_first: int
    num_last: int
    first: list[float] = field(default_factory=list)
    last: deque[float] = field(default_factory=deque)

    def add(self, value: float | None) -> None:
        if value is None or not math.isfinite(value):
            return
        if len(self.first) < self.num_first:
            self.first.append(value)
            return
        self.last.append(value)
        if len(self.last) > self.num_last:
            self.last.popleft()

    @property
    def start(self) -> float:
        return sum(self.first) / len(self.first)

    @property
    def recent(self) -> float | None:
        """None until there are as many values as are averaged."""
        if len(self.last) < self.num_last:
            return None
        return sum(self.last) / self.num_last


class CollapseWatch:
    """Follows the signals over a run; what it says follows from the metrics alone.

    ends_run: whether the configuration wants the run to end now.
    reason: the last finding, for the error that ends it.
    """

    def __init__(self, config: CollapseConfig) -> None:
        self.config = config
        self.ends_run = False
        self.reason = ""
        self._courses: dict[str, _Course] = {}
        self._told: dict[str, int] = {}  # signal -> steps since it was told of
        metrics = {metric for signal in SIGNALS for metric in (signal.metric, signal.teacher)}
        self._metrics = metrics - {""}

    def observe(self, metrics: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Take a step's metrics.

        Returns: collapse/<signal> of each signal that can be judged, 1 while it is out of its
            limits, else 0; and lines for the person.
        """
        for name in self._metrics & metrics.keys():
            self._find(name).add(metrics[name])
        judged: dict[str, float] = {}
        lines: list[str] = []
        for signal in SIGNALS:
            if self._limit(signal) is None or signal.metric not in metrics:
                continue
            found = self._judge(signal)
            if found is None:
                continue
            judged[f"collapse/{signal.name}"] = float(bool(found))
            lines += self._tell(signal, found)
        return judged, lines

    def state(self) -> dict[str, Any]:
        """For a checkpoint; restore takes it back."""
        return {
            name: {
                "window": [course.num_first, course.num_last],
                "first": list(course.first),
                "last": list(course.last),
            }
            for name, course in self._courses.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where state() was asked; a metric whose window is another now begins anew."""
        for name, kept in state.items():
            course = self._find(name)
            if [course.num_first, course.num_last] == kept["window"]:
                course.first, course.last = list(kept["first"]), deque(kept["last"])

    def _find(self, metric: str) -> _Course:
        window = self.config.window
        counts = MEASURED_WINDOW if metric.startswith("held_out/") else (window, window)
        return self._courses.setdefault(metric, _Course(*counts))

    def _limit(self, signal: Signal) -> float | None:
        limit: float | None = getattr(self.config, signal.key)
        return limit

    def _judge(self, signal: Signal) -> str | None:
        """What is wrong, empty if all is well; None if there are too few values to say."""
        limit, course = self._limit(signal), self._find(signal.metric)
        recent = course.recent
        assert limit is not None, "observe has looked"
        if recent is None:
            return None
        teacher = self._find(signal.teacher).recent if signal.teacher else None
        known = [course.start, *([] if teacher is None else [teacher])]
        reference = max(known) if signal.rises else min(known)
        is_out = recent > limit * reference if signal.rises else recent < limit * reference
        if not is_out:
            return ""
        beside = "" if teacher is None else f", the teacher's {teacher:.3g}"
        side = "above" if signal.rises else "below"
        return (
            f"the student may be collapsing: {signal.title} is {recent:.3g}, at first it was "
            f"{course.start:.3g}{beside} ({side} distill.collapse.{signal.key}={limit:g} of "
            f"{'both' if beside else 'that'}, over {course.num_last} "
            f"{'measurements' if signal.is_measured else 'steps'})"
        )

    def _tell(self, signal: Signal, found: str) -> list[str]:
        """The line of a signal where it is new, or is to be said again."""
        if not found:
            self._told.pop(signal.name, None)
            return []
        since = self._told.get(signal.name)
        again = self.config.action == "alarm" and since is not None and since >= self.config.window
        self._told[signal.name] = 1 if since is None or again else since + 1
        if self.config.action == "stop":
            self.ends_run, self.reason = True, found
        return [found] if since is None or again else []
