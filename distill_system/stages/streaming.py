"""Both streams ahead of the learner, within a bound (max_staleness S > 0).

Prompts go to engines one by one, each finished sequence goes to a scorer, scored ones wait for the
step that learns from them; at most S + 1 batches are under way. One loop in this process hears of
all of it: whoever waits for something lets the others go on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from distill_system.data import PromptFrontier, RunData
from distill_system.flow import StalenessWindow, Ticket
from distill_system.observe.activity import PoolClock, Wait
from distill_system.records import PoolActivity, Prompt, StepResult, Stream, Trajectory
from distill_system.rollout import ContinuousRollouts, Order
from distill_system.scoring import ContinuousScoring, ScoredChunk
from distill_system.stages.context import RunContext
from distill_system.stages.pools import Pools
from distill_system.stages.streams import Streams
from distill_system.workers import Reference, Workers

LOOK_SECONDS = 1.0


class ContinuousStreams(Streams):
    """The pools' event loop; see the module.

    clock: seconds, never backwards; tests bring their own.
    """

    def __init__(
        self,
        context: RunContext,
        pools: Pools,
        data: RunData,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(context, pools, data)
        self._clock = clock
        self._windows: dict[Stream, StalenessWindow] = {}
        self._orders: dict[str, tuple[Stream, Ticket]] = {}
        self._published = 0
        self._packing: list[Reference] = []
        self._receiving: dict[Reference, int] = {}
        self._recent_off_policy: deque[ScoredChunk] = deque()
        self._last_news = clock()

    def begin(self, step: int) -> None:
        """Open the windows and begin to write."""
        distill, rollout = self.config.distill, self.config.rollout
        now, staleness = self._clock(), distill.staleness
        self._published = step
        self._first_step = step
        self._windows = {
            stream: StalenessWindow(
                batch_size=distill.sequences(stream.value),
                max_staleness=staleness.max_staleness,
                first_step=step,
                end_step=distill.steps,
                too_old=staleness.too_old if stream is Stream.ON_POLICY else "wait",
                min_share=staleness.min_on_policy_share if stream is Stream.ON_POLICY else 1.0,
            )
            for stream in Stream
            if distill.sequences(stream.value) > 0
        }
        groups = self._groups()
        self._clocks = {name: PoolClock(group.members, now) for name, group in groups.items()}
        self._clocks["learner"] = PoolClock([0], now)  # its ranks work side by side, as one
        how: dict[str, Any] = {
            "sampling": self._sampling(),
            "seed": self.config.seed,
            "slice_seconds": rollout.slice_seconds,
            "version": step,
        }
        self._writers = {
            Stream.ON_POLICY: ContinuousRollouts(
                groups["student_rollout"], self._clocks["student_rollout"], **how
            ),
            Stream.OFF_POLICY: ContinuousRollouts(
                groups["teacher_rollout"], self._clocks["teacher_rollout"], **how
            ),
        }
        ranks = self.config.pools.learner.count
        self._scoring = ContinuousScoring(
            groups["teacher_scoring"],
            self._clocks["teacher_scoring"],
            needs={s: distill.objective.teacher_needs(s.value) for s in self._windows},
            max_tokens=self.config.scoring.max_tokens_per_batch,
            max_sequences={s: max(1, w.fewest // ranks) for s, w in self._windows.items()},
            max_wait_seconds=self.config.scoring.max_wait_seconds,
        )
        self._turn()

    def take(self, step: int) -> list[ScoredChunk]:
        """Wait for the step's batches; whichever pool it waits for is told as the phase."""
        while (missing := self._find_missing(step)) is not None:
            with self.context.timings.phase(missing):
                self._turn()
        off_policy = self._take_stream(step, Stream.OFF_POLICY)
        on_policy = self._take_stream(step, Stream.ON_POLICY)
        return [*off_policy, *self._fill(on_policy), *on_policy]

    def learn(self, step: int, scored: Sequence[ScoredChunk]) -> StepResult:
        """The other pools go on while the learner learns."""
        with self.context.timings.phase("learner"):
            self._clocks["learner"].begin(0, self._clock())
            references = self.pools.learner.start_step(step, scored)
            under_way = list(references)
            while under_way:
                done = self._turn(under_way)
                under_way = [reference for reference in under_way if reference not in done]
            result = self.pools.learner.finish_step(step, references)
            now = self._clock()
            self._clocks["learner"].end(0, now, busy_seconds=result.seconds)
            self._clocks["learner"].hand_on(
                num_tokens=result.num_response_tokens,
                num_sequences=sum(len(part.chunk.trajectories) for part in scored),
            )
        return result

    def publish(self, version: int) -> None:
        """Begin to send; the learner goes on once it has packed its weights."""
        with self.context.timings.phase("publish"):
            self.settle()
            self._packing = self.pools.learner.start_publish(version)
            self._published = version

    def settle(self) -> None:
        """Return once every student worker holds what was published last."""
        while self._packing or self._receiving:
            self._turn()

    def hear(self, measured: Mapping[str, float]) -> None:
        """The schedule follows no measurement: replay belongs to lockstep."""

    def state(self) -> dict[str, Any]:
        """What is under way is given out again, in its order."""
        frontiers = self._frontiers()
        return {
            name: frontiers[stream].state(under_way=self._under_way(stream))
            for name, stream in (("student", Stream.ON_POLICY), ("teacher", Stream.OFF_POLICY))
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Streams."""
        self.student.restore(state["student"])
        self.mixture.frontier.restore(state["teacher"])

    def pop_activity(self) -> dict[str, PoolActivity]:
        """What every pool did since this was last asked."""
        now = self._clock()
        queued = {
            "student_rollout": self._writers[Stream.ON_POLICY].num_under_way,
            "teacher_rollout": self._writers[Stream.OFF_POLICY].num_under_way,
            "teacher_scoring": self._scoring.num_waiting,
        }
        return {
            name: clock.pop(now, queued=queued.get(name, 0)) for name, clock in self._clocks.items()
        }

    # the loop

    def _turn(self, extra: Sequence[Reference] = ()) -> list[Reference]:
        """Give out what may be given, wait for news, hand it on; those of `extra` that are done."""
        now = self._clock()
        self._give_out()
        for writer in self._writers.values():
            writer.begin(now)
        next_due = self._scoring.begin(now)
        writing = {ref: stream for stream, w in self._writers.items() for ref in w.references}
        scoring = set(self._scoring.references)
        every = [*writing, *scoring, *self._packing, *self._receiving, *extra]
        done = self.pools.scorers.workers.wait_any(
            every,
            what="trajectories and the learner",
            seconds=LOOK_SECONDS if next_due is None else min(LOOK_SECONDS, max(0.0, next_due)),
        )
        now = self._clock()
        self._require_news(done, every, now)
        for reference in done:
            if reference in writing:
                self._hear_of(writing[reference], reference, now)
            elif reference in scoring:
                self._scoring.collect(reference, now)
            elif reference in self._packing or reference in self._receiving:
                self._hear_of_weights(reference)
        return done

    def _give_out(self) -> None:
        """Every prompt that the windows have room for, to the least loaded worker."""
        window = self._windows.get(Stream.ON_POLICY)
        writer = self._writers[Stream.ON_POLICY]
        while window is not None and (found := writer.find_free(window.can_give)) is not None:
            dropped = window.pop_dropped()
            index = self.student.take(1)[0] if dropped is None else dropped
            ticket = window.give(index, found[1], again=dropped is not None)
            self._order(Stream.ON_POLICY, found[0], ticket, self.data.prompts[index])
        window = self._windows.get(Stream.OFF_POLICY)
        while window is not None and window.can_give(window.next_step):
            index = self.mixture.frontier.take(1)[0]
            ticket = window.give(index, window.next_step)
            item = self.mixture.look_up(index)
            if isinstance(item, Prompt):
                found = self._writers[Stream.OFF_POLICY].find_free(lambda version: True)
                assert found is not None, "the teacher's pool has a worker"
                self._order(Stream.OFF_POLICY, found[0], ticket, item)
            else:
                self._arrive(Stream.OFF_POLICY, ticket, item, self._clock())
        self._tell_waits()

    def _order(self, stream: Stream, worker: int, ticket: Ticket, prompt: Prompt) -> None:
        number = self._first_step * self._windows[stream].batch_size + ticket.number
        order = Order(prompt=prompt, label=f"ticket_{number}")
        author = "student" if stream is Stream.ON_POLICY else "teacher"
        name = order.name(author)
        self._orders[name] = (stream, ticket)
        self._writers[stream].give(worker, name, order)

    def _hear_of(self, stream: Stream, reference: Reference, now: float) -> None:
        """A slice is done: what it finished goes on to scoring."""
        said = self._writers[stream].collect(reference, now)
        author = "student" if stream is Stream.ON_POLICY else "teacher"
        self._count(author, said.trajectories)
        for trajectory in said.trajectories:
            _, ticket = self._orders.pop(trajectory.trajectory_id)
            self._arrive(stream, ticket, trajectory, now)

    def _hear_of_weights(self, reference: Reference) -> None:
        """The learner has packed a version, or a student worker holds it."""
        if reference in self._packing:
            self._packing.remove(reference)
            if not self._packing:
                members = self.pools.students.workers.members
                answers = self.pools.learner.receiving()
                self._receiving = dict(zip(answers, members, strict=False))
            return
        self._writers[Stream.ON_POLICY].hold(self._receiving.pop(reference), self._published)
        if not self._receiving:
            self.pools.learner.finish_publish()

    def _arrive(self, stream: Stream, ticket: Ticket, trajectory: Trajectory, now: float) -> None:
        window = self._windows[stream]
        ages = stream is Stream.ON_POLICY
        step = window.sort(ticket, trajectory.oldest_version if ages else None)
        if step is not None:
            self._scoring.add(step, stream, trajectory, now=now)
            if window.is_full(step):
                self._scoring.close(step, stream)

    def _find_missing(self, step: int) -> str | None:
        """The pool that owes a part of what the step learns from, as a phase; None if none does."""
        for stream, window in self._windows.items():
            if not window.is_enough():
                return "student_rollout" if stream is Stream.ON_POLICY else "teacher_rollout"
            self._scoring.close(step, stream)
        scored = all(self._scoring.is_scored(step, stream) for stream in self._windows)
        return None if scored else "teacher_scoring"

    def _take_stream(self, step: int, stream: Stream) -> list[ScoredChunk]:
        if stream not in self._windows:
            return []
        self._windows[stream].take()
        scored = self._scoring.take(step, stream)
        for part in scored:
            self._feed(stream.value, part.chunk.trajectories)
        if stream is Stream.OFF_POLICY:
            self._recent_off_policy.extend(scored)
        return scored

    def _fill(self, on_policy: Sequence[ScoredChunk]) -> list[ScoredChunk]:
        """Off-policy text of the steps before once more, for what the on-policy batch lacks.

        The teacher's text does not age, and it is scored already.
        """
        window = self._windows.get(Stream.ON_POLICY)
        lacks = 0 if window is None else window.batch_size - _num_sequences(on_policy)
        again: list[ScoredChunk] = []
        ahead = self._sequences(Stream.OFF_POLICY)
        while _num_sequences(self._recent_off_policy) > ahead + self._kept_sequences():
            self._recent_off_policy.popleft()
        for part in list(self._recent_off_policy):
            if len(part.chunk.trajectories) <= lacks - _num_sequences(again):
                again.append(part)
                self._feed("off_policy_again", part.chunk.trajectories)
        return again

    def _tell_waits(self) -> None:
        """Why an idle rollout worker is idle: the window is full, or its weights are old."""
        now, window = self._clock(), self._windows.get(Stream.ON_POLICY)
        awaits_weights = window is not None and window.can_give(self._published)
        self._clocks["student_rollout"].waits(Wait.STARVED if awaits_weights else Wait.BLOCKED, now)
        self._clocks["teacher_rollout"].waits(Wait.BLOCKED, now)

    def _require_news(
        self, done: Sequence[Reference], waited: Sequence[Reference], now: float
    ) -> None:
        """Raises: DeadlineError if nothing has come for deadlines.call_seconds."""
        if done or not waited:
            self._last_news = now
        elif now - self._last_news > self.config.deadlines.call_seconds:
            self.pools.scorers.workers.finish(waited, what="trajectories", fetch=False, seconds=0.1)

    def _groups(self) -> dict[str, Workers]:
        return {
            "student_rollout": self.pools.students.workers,
            "teacher_rollout": self.pools.teachers.workers,
            "teacher_scoring": self.pools.scorers.workers,
        }

    def _frontiers(self) -> dict[Stream, PromptFrontier]:
        return {Stream.ON_POLICY: self.student, Stream.OFF_POLICY: self.mixture.frontier}

    def _kept_sequences(self) -> int:
        """Off-policy sequences of earlier steps that are kept, for what a batch may lack."""
        window = self._windows.get(Stream.ON_POLICY)
        return 0 if window is None else window.batch_size - window.fewest

    def _under_way(self, stream: Stream) -> list[int]:
        window = self._windows.get(stream)
        return [] if window is None else window.prompts_under_way()


def _num_sequences(scored: Iterable[ScoredChunk]) -> int:
    return sum(len(part.chunk.trajectories) for part in scored)
