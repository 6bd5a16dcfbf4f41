"""Both streams ahead of the learner, within a bound (max_staleness S > 0).

Prompts go to engines one by one, each finished sequence goes to a scorer, scored ones wait for the
step that learns from them; at most S + 1 batches are under way. One loop in this process hears of
all of it: whoever waits for something lets the others go on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import chain
from typing import Any

from distill_system.data import RunData
from distill_system.observe import PoolClock, Wait, staleness_metrics
from distill_system.records import PoolActivity, ScoredChunk, StepResult, Stream
from distill_system.rollout import NO_VERSION, AsynchronousRollouts
from distill_system.run.context import RunContext
from distill_system.run.pools import Pools
from distill_system.scoring import AsynchronousScoring
from distill_system.streams.stream_flow import LookUp, StreamFlow
from distill_system.streams.streams import Streams
from distill_system.streams.window import StalenessWindow
from distill_system.workers import Reference

LOOK_SECONDS = 1.0
TOGETHER_SHARE = 0.25
"""Of a slice: so long a turn listens for more. Each worker has another slice under way."""

POOL_OF = {Stream.ON_POLICY: "student_rollout", Stream.OFF_POLICY: "teacher_rollout"}


class AsynchronousStreams(Streams):
    """The pools' event loop; see the module.

    clock: seconds, never backwards; tests bring their own.
    """

    is_asynchronous = True

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
        self._last_news = clock()
        self._flows: dict[Stream, StreamFlow] = {}
        self._recent_off_policy: deque[ScoredChunk] = deque()
        self._staleness: dict[str, float] = {}
        self._num_dropped = 0
        self._published = 0
        self._packing: list[Reference] = []
        self._receiving: dict[Reference, int] = {}

    def begin(self, step: int) -> None:
        """Open the windows and begin to write."""
        now = self._clock()
        self._published = step
        self._rollouts = {
            POOL_OF[Stream.ON_POLICY]: self.pools.students.workers,
            POOL_OF[Stream.OFF_POLICY]: self.pools.teachers.workers,
        }
        scorers = self.pools.scorers.workers
        pools = {**self._rollouts, "teacher_scoring": scorers}
        self._clocks = {name: PoolClock(group.members, now) for name, group in pools.items()}
        self._clocks["learner"] = PoolClock([0], now)  # its ranks work side by side, as one
        self._scoring = AsynchronousScoring(
            scorers,
            self._clocks["teacher_scoring"],
            needs={s: self.config.distill.objective.teacher_needs(s.value) for s in Stream},
            max_tokens=self.config.scoring.max_tokens_per_batch,
            max_sequences={s: self._chunk_sequences(s) for s in Stream},
            max_wait_seconds=self.config.scoring.max_wait_seconds,
        )
        self._flows = {s: self._open_flow(s, step) for s in Stream if self._sequences(s) > 0}
        self._turn()

    def take(self, step: int) -> list[ScoredChunk]:
        """Wait for the step's batches; whichever pool it waits for is told as the phase."""
        while (missing := self._find_missing(step)) is not None:
            with self.context.timings.phase(missing):
                self._turn()
        off_policy = self._take_stream(step, Stream.OFF_POLICY)
        on_policy = self._take_stream(step, Stream.ON_POLICY)
        on_policy += self._take_more(step, [*off_policy, *on_policy])
        self._describe_staleness(step, on_policy)
        again = self._fill(on_policy)
        self._recent_off_policy.extend(off_policy)
        return [*off_policy, *again, *on_policy]

    def learn(self, step: int, scored: Sequence[ScoredChunk]) -> StepResult:
        """The other pools go on while the learner learns."""
        clock = self._clocks["learner"]
        with self.context.timings.phase("learner"):
            clock.begin(0, self._clock())
            references = self.pools.learner.start_step(step, scored)
            under_way = list(references)
            while under_way:
                done = self._turn(under_way)
                under_way = [reference for reference in under_way if reference not in done]
            result = self.pools.learner.finish_step(step, references)
            clock.end(0, self._clock(), busy_seconds=result.seconds)
            clock.hand_on(
                num_tokens=result.num_response_tokens, num_sequences=_num_sequences(scored)
            )
        return result

    def publish(self, version: int) -> None:
        """Begin to send; the learner goes on once it has packed its weights."""
        with self.context.timings.phase("publish"):
            self.wait_for_weight_sync()
            self._packing = list(self.pools.learner.start_publish(version))
            self._published = version

    def wait_for_weight_sync(self) -> None:
        """Return once every student worker holds what was published last."""
        while self._packing or self._receiving:
            self._turn()

    def on_metrics(self, measured: Mapping[str, float]) -> None:
        """No schedule follows measurements here; the pools' time in them is not the run's own."""
        if measured:
            self.pop_activity()

    def state(self) -> dict[str, Any]:
        """What is under way is given out again, in its order."""
        return {
            "student": self.student.state(under_way=self._under_way(Stream.ON_POLICY)),
            "teacher": self.mixture.frontier.state(under_way=self._under_way(Stream.OFF_POLICY)),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Streams."""
        self.student.restore(state["student"])
        self.mixture.frontier.restore(state["teacher"])

    def release(self, pool: str, worker: int) -> bool:
        """See Streams; a rollout worker's prompts go to the others at once."""
        if pool == "teacher_scoring":
            return self._scoring.release(worker, self._clock())
        for stream, flow in self._flows.items():
            if POOL_OF[stream] == pool and worker in flow.writer.workers:
                flow.take_back(worker, self._clock())
        return True

    def welcome(self) -> None:
        """See Streams; a student worker gets prompts once it holds published weights."""
        now = self._clock()
        for worker in set(self.pools.scorers.workers.members) - self._scoring.workers:
            self._scoring.take_in(worker, now)
        for stream, flow in self._flows.items():
            for worker in set(self._rollouts[POOL_OF[stream]].members) - flow.writer.workers:
                flow.writer.take_in(worker, now, version=NO_VERSION if flow.ages else 0)

    def pop_activity(self) -> dict[str, PoolActivity]:
        """What every pool did since this was last asked."""
        now = self._clock()
        queued = {POOL_OF[s]: flow.writer.num_under_way for s, flow in self._flows.items()}
        queued["teacher_scoring"] = self._scoring.num_waiting
        return {name: c.pop(now, queued=queued.get(name, 0)) for name, c in self._clocks.items()}

    def pop_counts(self) -> dict[str, float]:
        """With how old the step's text was, and how much of both streams is under way."""
        under_way = sum(flow.window.num_under_way for flow in self._flows.values())
        return super().pop_counts() | self._staleness | {"in_flight/sequences": float(under_way)}

    def _open_flow(self, stream: Stream, step: int) -> StreamFlow:
        staleness, is_student = self.config.distill.staleness, stream is Stream.ON_POLICY
        look_up: LookUp = self.data.prompts.__getitem__ if is_student else self.mixture.look_up
        window = StalenessWindow(
            batch_size=self._sequences(stream),
            max_staleness=staleness.max_staleness,
            first_step=step,
            end_step=self.config.distill.steps,
            too_old=staleness.too_old if is_student else "wait",
            min_share=staleness.min_on_policy_share if is_student else 1.0,
        )
        writer = AsynchronousRollouts(
            self._rollouts[POOL_OF[stream]],
            self._clocks[POOL_OF[stream]],
            slice_seconds=self.config.rollout.slice_seconds,
            version=step,
        )
        return StreamFlow(
            stream,
            window,
            writer,
            self._scoring,
            frontier=self.student if is_student else self.mixture.frontier,
            look_up=look_up,
            sampling=self._sampling(),
            seed=self.config.seed,
        )

    def _chunk_sequences(self, stream: Stream) -> int:
        """Most sequences scored together, so that every learner rank has a chunk of each stream."""
        is_student, share = stream is Stream.ON_POLICY, self.config.distill.staleness
        fewest = self._sequences(stream) * (share.min_on_policy_share if is_student else 1.0)
        return max(1, int(fewest) // self.config.pools.learner.count)

    def _turn(self, extra: Sequence[Reference] = ()) -> list[Reference]:
        """Give out what may be given, wait for news, hand it on; those of `extra` that are done."""
        next_due = self._give_out(self._clock())
        writing = {stream: flow.writer.references for stream, flow in self._flows.items()}
        urgent = [*extra, *self._packing, *self._scoring.references]
        unhurried = [*self._receiving, *chain.from_iterable(writing.values())]
        done = self.pools.scorers.workers.wait_any(
            urgent,
            what="trajectories and the learner",
            seconds=LOOK_SECONDS if next_due is None else min(LOOK_SECONDS, max(0.0, next_due)),
            unhurried=unhurried,
            together_seconds=TOGETHER_SHARE * self.config.rollout.slice_seconds,
        )
        now = self._clock()
        self._require_news(done, [*urgent, *unhurried], now)
        self._hand_on(set(done), writing, now)
        return done

    def _give_out(self, now: float) -> float | None:
        """Prompts to writers, chunks to scorers; seconds until a chunk has waited long enough."""
        for flow in self._flows.values():
            flow.give_out(now)
            flow.writer.begin(now)
            waits = Wait.STARVED if flow.awaits_weights(self._published) else Wait.BLOCKED
            self._clocks[POOL_OF[flow.stream]].waits(waits, now)
        return self._scoring.begin(now)

    def _hand_on(
        self, done: Set[Reference], writing: Mapping[Stream, Sequence[Reference]], now: float
    ) -> None:
        """Texts to scoring, scores to their steps, versions to the workers that hold them."""
        for stream, references in writing.items():
            flow, ended = self._flows[stream], [each for each in references if each in done]
            if ended:
                self._count("student" if flow.ages else "teacher", flow.hear_of(ended, now))
        for reference in [each for each in self._scoring.references if each in done]:
            self._scoring.collect(reference, now)
        for reference in [each for each in (*self._packing, *self._receiving) if each in done]:
            self._hear_of_weights(reference)

    def _hear_of_weights(self, reference: Reference) -> None:
        """The learner has packed a version, or a student worker holds it."""
        if reference in self._packing:
            self._packing.remove(reference)
            if not self._packing:
                members = self.pools.students.workers.members
                self._receiving = dict(zip(self.pools.learner.receiving(), members, strict=False))
            return
        worker = self._receiving.pop(reference)
        if Stream.ON_POLICY in self._flows:
            self._flows[Stream.ON_POLICY].writer.hold(worker, self._published)
        if not self._receiving:
            self.pools.learner.finish_publish()

    def _require_news(
        self, done: Sequence[Reference], waited: Sequence[Reference], now: float
    ) -> None:
        """Raises: DeadlineError if nothing has come for deadlines.call_seconds."""
        if done:
            self._last_news = now
        elif now - self._last_news > self.config.deadlines.call_seconds:
            self.pools.scorers.workers.finish(
                waited, what="trajectories and the learner", fetch=False, seconds=LOOK_SECONDS
            )

    def _find_missing(self, step: int) -> str | None:
        """The pool that owes a part of what the step learns from, as a phase; None if none does."""
        for stream, flow in self._flows.items():
            if not flow.window.is_enough():
                return POOL_OF[stream]
            self._scoring.close(step, stream)
        scored = all(self._scoring.is_scored(step, stream) for stream in self._flows)
        return None if scored else "teacher_scoring"

    def _take_stream(self, step: int, stream: Stream) -> list[ScoredChunk]:
        if stream not in self._flows:
            return []
        return self._fed_on(stream.value, self._flows[stream].take(step))

    def _take_more(self, step: int, scored: Sequence[ScoredChunk]) -> list[ScoredChunk]:
        """The student's text that is ready for the next step, up to the step's budget of tokens."""
        budget = self.config.distill.staleness.tokens_per_step
        if budget is None or Stream.ON_POLICY not in self._flows:
            return []
        left = budget - sum(part.chunk.num_response_tokens for part in scored)
        more = self._flows[Stream.ON_POLICY].take_more(step + 1, left)
        return self._fed_on(Stream.ON_POLICY.value, more)

    def _fed_on(self, stream: str, scored: list[ScoredChunk]) -> list[ScoredChunk]:
        for part in scored:
            self._feed(stream, part.chunk.trajectories)
        return scored

    def _fill(self, on_policy: Sequence[ScoredChunk]) -> list[ScoredChunk]:
        """Off-policy text of the steps before once more, for what the on-policy batch lacks.

        The teacher's text does not age, and it is scored already.
        """
        if Stream.ON_POLICY not in self._flows:
            return []
        window = self._flows[Stream.ON_POLICY].window
        lacks, again = window.batch_size - _num_sequences(on_policy), list[ScoredChunk]()
        while _num_sequences(self._recent_off_policy) > window.batch_size - window.fewest:
            self._recent_off_policy.popleft()
        for part in self._recent_off_policy:
            if len(part.chunk.trajectories) <= lacks - _num_sequences(again):
                again.append(part)
        return self._fed_on("off_policy_again", again)

    def _describe_staleness(self, step: int, on_policy: Sequence[ScoredChunk]) -> None:
        if Stream.ON_POLICY in self._flows:
            window = self._flows[Stream.ON_POLICY].window
            dropped, self._num_dropped = window.num_dropped - self._num_dropped, window.num_dropped
            self._staleness = staleness_metrics(
                (trajectory for part in on_policy for trajectory in part.chunk.trajectories),
                step,
                max_staleness=window.max_staleness,
                num_reissued=dropped,
                num_dropped=dropped,
            )

    def _under_way(self, stream: Stream) -> list[int]:
        return self._flows[stream].window.prompts_under_way() if stream in self._flows else []


def _num_sequences(scored: Iterable[ScoredChunk]) -> int:
    return sum(len(part.chunk.trajectories) for part in scored)
