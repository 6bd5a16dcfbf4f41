"""Both streams in step with the learner (max_staleness 0): a run repeats to the bit.

The student writes a step's text under the weights that learn from it. The off-policy stream does
not depend on the student: it is asked for one step ahead, so that the teacher writes while others
work.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from distill_system.data import RunData
from distill_system.records import (
    PoolActivity,
    Prompt,
    ScoredChunk,
    StepResult,
    Stream,
    Trajectory,
    WorkDone,
)
from distill_system.rollout import PendingRollouts, Sampling
from distill_system.run.context import RunContext
from distill_system.run.pools import Pools
from distill_system.streams.replay import AdaptiveReplay, StepKind
from distill_system.streams.streams import Streams

HELD_OUT_LOSS = "held_out/cross_entropy"


class LockstepStreams(Streams):
    """One batch after another; every pool waits for the others."""

    is_asynchronous = False

    def __init__(self, context: RunContext, pools: Pools, data: RunData) -> None:
        super().__init__(context, pools, data)
        self._work: dict[str, WorkDone] = {}
        self._work_since = time.perf_counter()
        self._learned = WorkDone()
        self._before = self.mixture.frontier.state()
        self._ahead: list[Prompt | Trajectory] = []
        self._writing: PendingRollouts | None = None
        distill = self.config.distill
        self.replay = (
            AdaptiveReplay(distill.replay, seed=self.config.seed, total_steps=distill.steps)
            if distill.replay is not None
            else None
        )

    def begin(self, step: int) -> None:
        """Let the teacher write this step's off-policy stream."""
        self._ask_ahead(step)

    def take(self, step: int) -> list[ScoredChunk]:
        """The teacher reads its own text while the student writes."""
        waiting_for = self.context.timings.phase
        with waiting_for("teacher_rollout"):
            off_policy = self._score(self._off_policy(step), Stream.OFF_POLICY)
        with waiting_for("student_rollout"):
            written = self._feed("on_policy", self._on_policy(step))
        with waiting_for("teacher_scoring"):
            scored = [*off_policy, *self._score(written, Stream.ON_POLICY)]
            self.pools.scorers.wait(scored)
        return scored

    def learn(self, step: int, scored: Sequence[ScoredChunk]) -> StepResult:
        """The teacher writes the next step's text meanwhile."""
        self._ask_ahead(step + 1)
        with self.context.timings.phase("learner"):
            result = self.pools.learner.learn(step, scored)
        self._learned += result.work
        return result

    def publish(self, version: int) -> None:
        """Returns once every student worker holds the version."""
        with self.context.timings.phase("publish"):
            self.pools.learner.publish(version)

    def wait_for_weight_sync(self) -> None:
        """Nothing is under way between two steps."""

    def release(self, pool: str, worker: int) -> bool:
        """See Streams: between `take` and `learn` nothing is under way anywhere."""
        return True

    def welcome(self) -> None:
        """See Streams: every step deals its work to those who are there."""

    def pop_activity(self) -> dict[str, PoolActivity]:
        """By what the workers say of themselves; who does not work waits for the others."""
        now, total = time.perf_counter(), {**self.pools.work_done(), "learner": self._learned}
        seconds = now - self._work_since
        before, self._work, self._work_since = self._work, total, now
        return {
            pool: _describe(self._num_workers(pool), seconds, work - before.get(pool, WorkDone()))
            for pool, work in total.items()
        }

    def on_metrics(self, measured: Mapping[str, float]) -> None:
        """The replay's schedule follows the held-out loss."""
        if self.replay is not None and HELD_OUT_LOSS in measured:
            self.replay.on_metrics(measured[HELD_OUT_LOSS])

    def state(self) -> dict[str, Any]:
        """See Streams."""
        state: dict[str, Any] = {"student": self.student.state(), "teacher": self._before}
        return state if self.replay is None else state | {"replay": self.replay.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Streams."""
        self.student.restore(state["student"])
        self.mixture.frontier.restore(state["teacher"])
        self._before = self.mixture.frontier.state()
        if self.replay is not None:
            self.replay.restore(state["replay"])

    def _ask_ahead(self, step: int) -> None:
        """Take the off-policy stream of a step, and let the teacher write its part."""
        self._before = self.mixture.frontier.state()
        if step < self.config.distill.steps and self.replay is None:
            self._ahead = self._take_off_policy()
            prompts = [item for item in self._ahead if isinstance(item, Prompt)]
            if prompts:
                self._writing = self.pools.teachers.start(prompts, *self._how(step))

    def _off_policy(self, step: int) -> Sequence[Trajectory]:
        """The step's rows, stored samples, and what the teacher was asked for a step ago."""
        if self.replay is not None:
            chosen = self.replay.choose(step) is StepKind.DATA
            self._ahead = self._take_off_policy() if chosen else []
        written: Sequence[Trajectory] = ()
        if self._writing is not None:
            written = self._count("teacher", self.pools.teachers.finish(self._writing))
            self._writing = None
        answers = iter(written)
        stream = [next(answers) if isinstance(item, Prompt) else item for item in self._ahead]
        return self._feed("off_policy", stream)

    def _take_off_policy(self) -> list[Prompt | Trajectory]:
        taken = self.mixture.frontier.take(self._sequences(Stream.OFF_POLICY))
        return [self.mixture.look_up(index) for index in taken]

    def _on_policy(self, step: int) -> Sequence[Trajectory]:
        """What the student writes now, under its newest weights; or wrote, if there is replay."""
        count = self._sequences(Stream.ON_POLICY)
        kind = StepKind.WRITE if self.replay is None else self.replay.choose(step)
        if self.replay is not None and kind is StepKind.REPLAY:
            return self.replay.sample(step, count)
        if kind is StepKind.DATA:
            return ()
        prompts = [self.data.prompts[index] for index in self.student.take(count)]
        written = self._count("student", self.pools.students.generate(prompts, *self._how(step)))
        if self.replay is not None:
            self.replay.keep(written)
        return written

    def _score(self, trajectories: Sequence[Trajectory], stream: Stream) -> list[ScoredChunk]:
        """Let the teacher read while others work; nobody waits here."""
        ranks = self.config.pools.learner.count
        needs = self.config.distill.objective.teacher_needs(stream.value)
        return self.pools.scorers.start(trajectories, stream, needs=needs, num_shares=ranks)

    def _num_workers(self, pool: str) -> int:
        """The learner's ranks work side by side, as one."""
        groups = {
            "student_rollout": self.pools.students.workers,
            "teacher_rollout": self.pools.teachers.workers,
            "teacher_scoring": self.pools.scorers.workers,
        }
        return groups[pool].count if pool in groups else 1

    def _how(self, step: int) -> tuple[Sampling, int, str]:
        """Sampling, seed and label of a step's rollouts."""
        return self._sampling(), self.config.seed, f"step_{step}"


def _describe(num_workers: int, seconds: float, work: WorkDone) -> PoolActivity:
    """Who does not work waits for the others; what a worker did that has left is left out."""
    busy = min(max(0.0, work.busy_seconds), num_workers * seconds)
    return PoolActivity(
        num_workers=num_workers,
        seconds=seconds,
        busy_seconds=busy,
        starved_seconds=num_workers * seconds - busy,
        num_tokens=max(0, work.num_tokens),
    )
