"""Both streams asynchronous to the learner, within a bound (max_staleness S > 0).

Prompts go to engines one by one, each finished text goes to a scorer, scored ones wait for the step
that learns from them; at most S + 1 batches are in flight. One loop in this process (`_turn`) hears
of all of it: whoever waits for something lets the others go on.

    state      GIVEN        WRITING        WRITTEN       SCORING        SCORED
    kept by    in_flight.py, one entry per trajectory: the map of states and moves stands there
    moved by   stream_flow  writers        writers       scorers        scorers; `take` ends it

A rollout worker that leaves or is lost hands its entries back (WRITING -> GIVEN); they are written
again under the same names, so that they become the same samples.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from distill_system.data import RunData
from distill_system.errors import DeadlineError, NonFiniteError, TransferError, WorkerLostError
from distill_system.observe import Wait, staleness_metrics
from distill_system.records import OBJECTIVE_STREAMS, ScoredChunk, Stream
from distill_system.run.context import RunContext
from distill_system.run.pools import Pools
from distill_system.run.transfer_group import ANSWER_SECONDS
from distill_system.streams.in_flight import InFlight
from distill_system.streams.scorers import Scorers
from distill_system.streams.stream_flow import LookUp, StreamFlow
from distill_system.streams.streams import LOOK_SECONDS, Streams
from distill_system.streams.window import StalenessWindow
from distill_system.streams.writers import NO_VERSION, Writers
from distill_system.workers import Reference

TOGETHER_SHARE = 0.25
"""Of a slice: so long a turn listens for more. Each worker has another slice in flight."""

POOL_OF = {Stream.ON_POLICY: "student_rollout", Stream.OFF_POLICY: "teacher_rollout"}


class AsynchronousStreams(Streams):
    """The pools' event loop; see the module."""

    is_asynchronous = True

    def __init__(
        self,
        context: RunContext,
        pools: Pools,
        data: RunData,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(context, pools, data, clock=clock)
        self._flows: dict[Stream, StreamFlow] = {}
        self._recent_off_policy: deque[ScoredChunk] = deque()
        self._staleness: dict[str, float] = {}
        self._num_dropped = 0
        self._published = 0
        self._published_at = 0.0
        self._packing: list[Reference] = []
        # Each student engine's answer, with its name.
        self._receiving: dict[Reference, str] = {}
        self._failure: TransferError | WorkerLostError | None = None
        self._is_to_send_again = False
        self._doubted: set[tuple[Stream, int]] = (
            set()
        )  # text of which a scorer's numbers were not finite

    def begin(self, step: int) -> None:
        """Open the windows and begin to write."""
        super().begin(step)
        self._published = step
        self._flows = {
            s: self._open_flow(s, step) for s in OBJECTIVE_STREAMS if self._sequences(s) > 0
        }
        self._scorers = Scorers(
            self._watched["teacher_scoring"],
            {stream: flow.buffer for stream, flow in self._flows.items()},
            needs={
                s: self.config.distill.objective.teacher_needs(s.side) for s in OBJECTIVE_STREAMS
            },
            max_tokens=self.config.scoring.max_tokens_per_batch,
            max_sequences={s: self._chunk_sequences(s) for s in OBJECTIVE_STREAMS},
            max_wait_seconds=self.config.scoring.max_wait_seconds,
            clock=self._clock,
        )
        self._turn()

    def take(self, step: int) -> list[ScoredChunk]:
        """Wait for the step's batches; whichever pool it waits for is told as the phase."""
        while (missing := self._find_missing()) is not None:
            with self.context.timings.phase(missing):
                self._mend()
                self._turn()
        off_policy = self._take_stream(Stream.OFF_POLICY)
        on_policy = self._take_stream(Stream.ON_POLICY)
        on_policy += self._take_more([*off_policy, *on_policy])
        self._describe_staleness(step, on_policy)
        again = self._fill(on_policy)
        self._recent_off_policy.extend(off_policy)
        return [*off_policy, *again, *on_policy]

    def publish(self, version: int) -> None:
        """Begin to send; the learner goes on once it has packed its weights."""
        with self.context.timings.phase("publish"):
            self._is_to_send_again = False  # a newer one comes
            self._wait_for_answers()
            self._is_to_send_again = False
            self._begin_publish(version)

    def wait_for_weight_sync(self) -> None:
        """Return once every student worker holds what was published last."""
        self._wait_for_answers()
        while self._is_to_send_again:
            self._begin_publish(self._published)
            self._wait_for_answers()

    def bring_weights(self) -> None:
        """See Streams."""
        if not self._flows:
            self.pools.weights.publish(self.pools.weights.version)
            return
        self._wait_for_answers()
        self._is_to_send_again = True
        self.wait_for_weight_sync()

    def abandon(self) -> None:
        """See Streams; the engines forget what they write, other streams will ask for it again."""
        for flow in self._flows.values():
            for worker in flow.writers.members:
                flow.writers.workers.start(worker, "abandon")

    def state(self) -> dict[str, Any]:
        """What is in flight is given out again, in its order."""
        in_flight = {stream: flow.buffer.prompts() for stream, flow in self._flows.items()}
        student, teacher = (in_flight.get(s, []) for s in (Stream.ON_POLICY, Stream.OFF_POLICY))
        return {
            "student": self.student.state(under_way=student),
            "teacher": self.mixture.frontier.state(under_way=teacher),
            **self._shared_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Streams."""
        self.student.restore(state["student"])
        self.mixture.frontier.restore(state["teacher"])
        self._restore_shared(state)

    def release_worker(self, pool: str, worker: int) -> bool:
        """See Streams; a rollout worker's prompts go to the others at once."""
        if pool == "teacher_scoring":
            return self._scorers.leave(worker)
        for stream, flow in self._flows.items():
            if POOL_OF[stream] == pool and worker in flow.writers.members:
                flow.writers.leave(worker)
        return True

    def forget_worker(self, pool: str, worker: int) -> None:
        """See Streams; its prompts and chunks go to others at once."""
        if not self._watched:
            return  # nothing was given out yet
        if pool == "teacher_scoring":
            self._scorers.lose(worker)
        for stream, flow in self._flows.items():
            if POOL_OF[stream] == pool and worker in flow.writers.members:
                flow.writers.leave(worker, is_lost=True)

    def admit_workers(self) -> None:
        """See Streams; a student worker gets prompts once it holds published weights."""
        if not self._watched:
            return
        for worker in set(self._watched["teacher_scoring"].members) - self._scorers.members:
            self._scorers.join(worker)
        for stream, flow in self._flows.items():
            for worker in set(self._watched[POOL_OF[stream]].members) - flow.writers.members:
                flow.writers.join(worker, version=NO_VERSION if flow.buffer.ages else 0)

    def pop_counts(self) -> dict[str, float]:
        """With how old the step's text was, and how much of both streams is in flight."""
        in_flight = sum(flow.buffer.num_in_flight for flow in self._flows.values())
        return super().pop_counts() | self._staleness | {"in_flight/sequences": float(in_flight)}

    def _queued(self) -> dict[str, int]:
        queued = {POOL_OF[s]: flow.buffer.num_writing() for s, flow in self._flows.items()}
        return queued | {"teacher_scoring": self._scorers.num_waiting}

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
        buffer = InFlight(window, ages=is_student)
        writers = Writers(
            self._watched[POOL_OF[stream]],
            buffer,
            slice_seconds=self.config.rollout.slice_seconds,
            version=step,
            clock=self._clock,
        )
        return StreamFlow(
            stream,
            buffer,
            writers,
            draw=self._draw_student if is_student else self._draw_off_policy,
            look_up=look_up,
            sampling=self._sampling(stream),
            seed=self.config.seed,
            leave_out=self._leave_out if self.config.faults.fatal_prompts == "leave_out" else None,
            clock=self._clock,
        )

    def _draw_student(self) -> int:
        step = self.student.num_taken // self._sequences(Stream.ON_POLICY)
        return self.student.take(1, weights=self._weights(step))[0]

    def _draw_off_policy(self) -> int:
        frontier = self.mixture.frontier
        step = frontier.num_taken // self._sequences(Stream.OFF_POLICY)
        return frontier.take(1, weights=self.mixture.weights(self._weights(step)))[0]

    def _chunk_sequences(self, stream: Stream) -> int:
        """Most sequences scored together, so that every learner rank has a chunk of each stream."""
        is_student, share = stream is Stream.ON_POLICY, self.config.distill.staleness
        fewest = self._sequences(stream) * (share.min_on_policy_share if is_student else 1.0)
        return max(1, int(fewest) // self.config.pools.learner.count)

    def _wait(self, references: Sequence[Reference], *, what: str) -> None:
        left = list(references)
        while left:
            done = self._turn(left, what=what)
            left = [reference for reference in left if reference not in done]

    def _turn(
        self, extra: Sequence[Reference] = (), *, what: str = "trajectories"
    ) -> list[Reference]:
        """Give out what may be given, wait for news, hand it on; those of `extra` that are done."""
        next_due = self._give_out()
        slices = {stream: flow.writers.references for stream, flow in self._flows.items()}
        try:
            done = self._watched["teacher_scoring"].wait_any(
                [*extra, *self._packing, *self._scorers.references],
                what=what,
                seconds=LOOK_SECONDS if next_due is None else min(LOOK_SECONDS, max(0.0, next_due)),
                unhurried=[*self._receiving, *chain.from_iterable(slices.values())],
                together_seconds=TOGETHER_SHARE * self.config.rollout.slice_seconds,
            )
        except DeadlineError as late:
            self._lose_late(late)
            return []
        self._notice_losses()
        self._lose_hanging()
        self._require_answers_in_time()
        ended = set(done)
        for stream, references in slices.items():
            self._collect_text(stream, [each for each in references if each in ended])
        self._collect_scores(ended)
        for reference in [each for each in (*self._packing, *self._receiving) if each in ended]:
            self._hear_of_weights(reference)
        return done

    def _give_out(self) -> float | None:
        """Prompts to writers, chunks to scorers; seconds until a chunk has waited long enough."""
        for flow in self._flows.values():
            flow.give_out()
            flow.writers.begin()
            reason = Wait.STARVED if flow.awaits_weights(self._published) else Wait.BLOCKED
            flow.writers.workers.wait_for(reason)
        return self._scorers.begin()

    def _collect_text(self, stream: Stream, slices: Sequence[Reference]) -> None:
        writers = self._flows[stream].writers
        while slices := [each for each in slices if writers.awaits(each)]:
            try:
                written = writers.collect(slices)
            except WorkerLostError as lost:
                self._lose(lost)  # and with it the slices that it owed
            else:
                self._count("student" if stream is Stream.ON_POLICY else "teacher", written)

    def _collect_scores(self, ended: Collection[Reference]) -> None:
        while receipts := [each for each in self._scorers.references if each in ended]:
            try:
                self._scorers.collect(receipts)
            except WorkerLostError as lost:
                self._lose(lost)
            except NonFiniteError as error:
                self._doubt_scores(error)

    def _doubt_scores(self, error: NonFiniteError) -> None:
        """Numbers that are not finite are asked for once more, of another scorer.

        Raises: `error` where two scorers say so of the same text.
        """
        doubted = self._scorers.texts_of(error.worker)
        if not doubted or doubted & self._doubted:
            raise error
        self._doubted |= doubted
        self._lose(WorkerLostError(str(error), error.worker))

    def _lose_hanging(self) -> None:
        """A call that takes longer than any may, or slices without a token: its worker is lost."""
        limit = self.config.deadlines.call_seconds
        for stream, flow in self._flows.items():
            for worker in flow.writers.find_stuck(limit):
                name = f"{POOL_OF[stream]}-{worker}"
                said = f"{name} makes no progress: it has decoded for more than"
                self._lose(
                    WorkerLostError(f"{said} deadlines.call_seconds={limit:g} and no token", name)
                )
        for pool, watched in self._watched.items():
            for worker in watched.find_overdue(limit):
                name = f"{pool}-{worker}"
                self._lose(
                    WorkerLostError(
                        f"{name} hangs: a call of it is under way for more than "
                        f"deadlines.call_seconds={limit:g}",
                        name,
                    )
                )

    def _require_answers_in_time(self) -> None:
        """An engine that hangs says nothing; those that wait for it have said so by now."""
        limit = self.config.deadlines.publish_seconds + ANSWER_SECONDS
        if self._receiving and self._clock() - self._published_at > limit:
            late = list(self._receiving.values())
            said = (
                f"weight version {self._published} did not reach {', '.join(late)} in {limit:g} s"
            )
            self._give_up_publish(self._failure or DeadlineError(said, late))

    def _mend(self) -> None:
        """While the learner waits: what the pools cannot go on without."""
        if self.supervision is None:
            return
        for pool in {"teacher_scoring", *(POOL_OF[stream] for stream in self._flows)}:
            if self._watched[pool].count and not self._watched[pool].members:
                self.supervision.wait_for_worker(pool)
        if self._is_to_send_again:
            self.wait_for_weight_sync()

    def _begin_publish(self, version: int) -> None:
        self._is_to_send_again, self._failure = False, None
        self._published, self._published_at = version, self._clock()
        self._packing = list(self.pools.weights.start_publish(version))

    def _wait_for_answers(self) -> None:
        while self._packing or self._receiving:
            self._turn()

    def _hear_of_weights(self, reference: Reference) -> None:
        """The learner has packed a version, or a student worker holds it, or has failed to."""
        if reference in self._packing:
            self._packing.remove(reference)
            if not self._packing:
                self._hear_of_packing()
            return
        name = self._receiving.pop(reference)
        try:
            self.pools.learner.workers.finish([reference], what="a student worker's answer")
        except (TransferError, WorkerLostError) as error:
            self._failure = self._failure or error
        else:
            self._hold(name)
        if not self._receiving:
            self._end_publish()

    def _hear_of_packing(self) -> None:
        try:
            self._receiving = self.pools.weights.receiving()
        except (TransferError, DeadlineError) as error:
            self._give_up_publish(error)

    def _hold(self, name: str) -> None:
        """A student worker has the version that was published."""
        pool, _, worker = name.rpartition("-")
        if Stream.ON_POLICY in self._flows and pool == POOL_OF[Stream.ON_POLICY]:
            self._flows[Stream.ON_POLICY].writers.hold(int(worker), self._published)

    def _end_publish(self) -> None:
        if self._failure is None:
            self.pools.weights.finish_publish()
        else:
            self._give_up_publish(self._failure)

    def _give_up_publish(self, error: TransferError | DeadlineError | WorkerLostError) -> None:
        """Lose whoever failed it; the version is sent again as soon as the learner is idle."""
        self._receiving = {}
        self.pools.weights.recover(error)
        self._is_to_send_again = True

    def _find_missing(self) -> str | None:
        """The pool that owes a part of what the step learns from, as a phase; None if none does."""
        for stream, flow in self._flows.items():
            if not flow.buffer.has_enough():
                return POOL_OF[stream]
            flow.buffer.demand()
        is_scored = all(flow.buffer.is_scored() for flow in self._flows.values())
        return None if is_scored else "teacher_scoring"

    def _take_stream(self, stream: Stream) -> list[ScoredChunk]:
        if stream not in self._flows:
            return []
        return self._fed_on(stream.value, self._flows[stream].buffer.take())

    def _take_more(self, scored: Sequence[ScoredChunk]) -> list[ScoredChunk]:
        """The student's text that is ready for the next step, up to the step's budget of tokens."""
        budget = self.config.distill.staleness.tokens_per_step
        if budget is None or Stream.ON_POLICY not in self._flows:
            return []
        left = budget - sum(part.chunk.num_response_tokens for part in scored)
        more = self._flows[Stream.ON_POLICY].buffer.take_more(left)
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
        window = self._flows[Stream.ON_POLICY].buffer.window
        lacks, again = window.batch_size - _num_sequences(on_policy), list[ScoredChunk]()
        while _num_sequences(self._recent_off_policy) > window.batch_size - window.fewest:
            self._recent_off_policy.popleft()
        for part in self._recent_off_policy:
            if len(part.chunk.trajectories) <= lacks - _num_sequences(again):
                again.append(part)
        return self._fed_on("off_policy_again", again)

    def _describe_staleness(self, step: int, on_policy: Sequence[ScoredChunk]) -> None:
        if Stream.ON_POLICY in self._flows:
            buffer = self._flows[Stream.ON_POLICY].buffer
            dropped, self._num_dropped = buffer.num_dropped - self._num_dropped, buffer.num_dropped
            self._staleness = staleness_metrics(
                (trajectory for part in on_policy for trajectory in part.chunk.trajectories),
                step,
                max_staleness=buffer.window.max_staleness,
                num_dropped=dropped,
            )


def _num_sequences(scored: Iterable[ScoredChunk]) -> int:
    return sum(len(part.chunk.trajectories) for part in scored)
