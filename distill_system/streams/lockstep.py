"""Both streams in lockstep with the learner (max_staleness 0): a run repeats to the bit.

The student writes a step's text under the weights that learn from it. The off-policy stream does
not depend on the student: it is asked for one step ahead, so that the teacher writes while others
work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill_system.data import RunData
from distill_system.errors import DeadlineError
from distill_system.records import Prompt, ScoredChunk, StepResult, Stream, Trajectory
from distill_system.rollout import PendingRollouts, RolloutPool, Sampling
from distill_system.run.context import RunContext
from distill_system.run.pools import Pools
from distill_system.scoring import ScoringPool
from distill_system.streams.replay import AdaptiveReplay, StepKind
from distill_system.streams.streams import LOOK_SECONDS, Streams
from distill_system.workers import Reference

HELD_OUT_LOSS = "held_out/cross_entropy"


class LockstepStreams(Streams):
    """One batch after another; every pool waits for the others."""

    is_asynchronous = False

    def __init__(
        self,
        context: RunContext,
        pools: Pools,
        data: RunData,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(context, pools, data, clock=clock)
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
        super().begin(step)
        leave_out = self._leave_out if self.config.faults.fatal_prompts == "leave_out" else None
        self._students = RolloutPool(self._watched["student_rollout"], leave_out=leave_out)
        self._teachers = RolloutPool(self._watched["teacher_rollout"], leave_out=leave_out)
        self._scorers = ScoringPool(self._watched["teacher_scoring"])
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
            return self._finish_scores(scored)

    def learn(self, step: int, scored: Sequence[ScoredChunk]) -> StepResult:
        """The teacher writes the next step's text meanwhile."""
        self._ask_ahead(step + 1)
        return super().learn(step, scored)

    def publish(self, version: int) -> None:
        """Returns once every student worker holds the version."""
        with self.context.timings.phase("publish"):
            self.pools.weights.publish(version)

    def wait_for_weight_sync(self) -> None:
        """Nothing is under way between two steps."""

    def release_worker(self, pool: str, worker: int) -> bool:
        """See Streams: between `take` and `learn` no worker of these pools has a call."""
        watched = self._watched.get(pool)
        if watched is not None and worker in watched.present:
            watched.leave(worker)
        return True

    def forget_worker(self, pool: str, worker: int) -> None:
        """See Streams; its calls are made again where they are waited for."""
        self.release_worker(pool, worker)

    def admit_workers(self) -> None:
        """See Streams: every step deals its work to all members of a pool."""
        for watched in self._watched.values():
            for worker in set(watched.members) - watched.present:
                watched.join(worker)

    def bring_weights(self) -> None:
        """See Streams."""
        self.pools.weights.publish(self.pools.weights.version)

    def abandon(self) -> None:
        """See Streams; what the teacher writes ahead is asked for again by others."""
        self._writing = None

    def on_metrics(self, measured: Mapping[str, float]) -> None:
        """The replay's schedule follows the held-out loss."""
        super().on_metrics(measured)
        if self.replay is not None and HELD_OUT_LOSS in measured:
            self.replay.on_held_out_loss(measured[HELD_OUT_LOSS])

    def state(self) -> dict[str, Any]:
        """See Streams."""
        state: dict[str, Any] = {"student": self.student.state(), "teacher": self._before}
        state |= self._shared_state()
        return state if self.replay is None else state | {"replay": self.replay.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Streams."""
        self.student.restore(state["student"])
        self.mixture.frontier.restore(state["teacher"])
        self._before = self.mixture.frontier.state()
        self._restore_shared(state)
        if self.replay is not None:
            self.replay.restore(state["replay"])

    def _ask_ahead(self, step: int) -> None:
        """Take the off-policy stream of a step, and let the teacher write its part."""
        self._before = self.mixture.frontier.state()
        if step < self.config.distill.steps and self.replay is None:
            self._ahead = self._take_off_policy(step)
            prompts = [item for item in self._ahead if isinstance(item, Prompt)]
            if prompts:
                self._writing = self._teachers.start(prompts, *self._how(step, Stream.OFF_POLICY))

    def _off_policy(self, step: int) -> Sequence[Trajectory]:
        """The step's rows, stored samples, and what the teacher was asked for a step ago."""
        if self.replay is not None:
            chosen = self.replay.choose(step) is StepKind.DATA
            self._ahead = self._take_off_policy(step) if chosen else []
        written: Sequence[Trajectory | None] = ()
        if self._writing is not None:
            written = self._finish_writing("teacher", self._teachers, self._writing)
            self._writing = None
        answers = iter(written)
        stream = [next(answers) if isinstance(item, Prompt) else item for item in self._ahead]
        return self._feed("off_policy", _without_gaps(stream))

    def _take_off_policy(self, step: int) -> list[Prompt | Trajectory]:
        weights = self.mixture.weights(self._weights(step))
        return self.mixture.take(self._sequences(Stream.OFF_POLICY), weights=weights)

    def _on_policy(self, step: int) -> Sequence[Trajectory]:
        """What the student writes now, under its newest weights; or wrote, if there is replay."""
        count = self._sequences(Stream.ON_POLICY)
        kind = StepKind.WRITE if self.replay is None else self.replay.choose(step)
        if self.replay is not None and kind is StepKind.REPLAY:
            return self.replay.sample(step, count)
        if kind is StepKind.DATA:
            return ()
        taken = self.student.take(count, weights=self._weights(step))
        prompts = [self.data.prompts[index] for index in taken]
        pending = self._students.start(prompts, *self._how(step, Stream.ON_POLICY))
        written = _without_gaps(self._finish_writing("student", self._students, pending))
        if self.replay is not None:
            self.replay.keep(written)
        return written

    def _finish_writing(
        self, author: str, pool: RolloutPool, pending: PendingRollouts
    ) -> Sequence[Trajectory | None]:
        self._wait(pending.calls, what="rollouts")
        each = pool.finish_each(pending)
        written = self._count(author, _without_gaps(each))
        self._watched[f"{author}_rollout"].hand_on(
            num_tokens=sum(trajectory.num_response_tokens for trajectory in written),
            num_sequences=len(written),
        )
        return each

    def _score(self, trajectories: Sequence[Trajectory], stream: Stream) -> list[ScoredChunk]:
        """Let the teacher read while others work; nobody waits here."""
        ranks = self.config.pools.learner.count
        needs = self.config.distill.objective.teacher_needs(stream.side)
        return self._scorers.start(trajectories, stream, needs=needs, num_shares=ranks)

    def _finish_scores(self, scored: Sequence[ScoredChunk]) -> list[ScoredChunk]:
        """Wait for the scores, which stay where they are."""
        self._wait(self._scorers.receipts(scored), what="teacher scores")
        self._watched["teacher_scoring"].hand_on(
            num_tokens=sum(part.chunk.num_tokens for part in scored if part.targets is not None),
            num_sequences=sum(len(part.chunk.trajectories) for part in scored),
        )
        return self._scorers.finish(scored)

    def _wait(self, references: Sequence[Reference], *, what: str) -> None:
        """See Streams; each pool's clock hears of a call as it ends, not when it is needed."""
        left = list(references)
        while left:
            others = [call for watched in self._watched.values() for call in watched.calls]
            waited = list(dict.fromkeys([*left, *others]))
            try:
                done = self.pools.scorers.workers.wait_any(waited, what=what, seconds=LOOK_SECONDS)
            except DeadlineError as late:
                self._lose_late(late)
                continue  # their calls have ended now
            self._notice_losses()
            for watched in self._watched.values():
                watched.end(done)
            left = [reference for reference in left if reference not in done]

    def _how(self, step: int, stream: Stream) -> tuple[Sampling, int, str]:
        """Sampling, seed and label of a step's rollouts."""
        return self._sampling(stream), self.config.seed, f"step_{step}"


def _without_gaps(written: Sequence[Trajectory | None]) -> list[Trajectory]:
    """Without the places of prompts that were left out."""
    return [trajectory for trajectory in written if trajectory is not None]
