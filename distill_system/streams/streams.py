"""The streams of a distillation, as the driver sees them: take, learn, publish.

`Streams` walks over prompts in a seeded order, and counts what was fed and what the pools did. Two
kinds of it bring trajectories to the learner: in lockstep with it (lockstep.py), or asynchronously,
within a bound (asynchronous.py). Plain text, which nobody writes or scores, joins them as a step is
learned from.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distill_system.data import PromptFrontier, RunData, source_shares
from distill_system.errors import DeadlineError, WorkerLostError
from distill_system.observe import PoolClock, text_metrics
from distill_system.records import (
    PoolActivity,
    Prompt,
    ScoredChunk,
    StepResult,
    Stream,
    Trajectory,
    TrajectoryChunk,
)
from distill_system.rollout import Sampling
from distill_system.run.context import RunContext
from distill_system.run.pools import Pools
from distill_system.streams.off_policy import OffPolicyMixture
from distill_system.streams.source_weights import SourceWeights
from distill_system.streams.watched_workers import WatchedWorkers
from distill_system.workers import Reference, Supervision

LOOK_SECONDS = 1.0
"""Longest wait before the driver looks again whether all workers live."""

LEARNER = 0
"""The learner's ranks work side by side: its clock counts them as one worker."""


class Streams(ABC):
    """Both streams' prompts, what the learner was fed of them, and what the pools did for it.

    texts: the walk over plain text; None where no loss reads it.
    is_asynchronous: whether trajectories are written while the learner learns from earlier ones.
    supervision: who replaces lost workers; None ends the run at the first loss.
    clock: seconds that never run backwards; tests bring their own.
    """

    is_asynchronous: bool

    def __init__(
        self,
        context: RunContext,
        pools: Pools,
        data: RunData,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.context = context
        self.config = context.config
        self.pools = pools
        self.data = data
        shares = source_shares(data.prompts, self.config.data.prompt_weights)
        self.student = PromptFrontier(shares, self.config.seed, "student_prompts")
        self.mixture = OffPolicyMixture(self.config, data)
        policy, delay = self.config.data.source_policy, self.config.distill.staleness.max_staleness
        self.source_weights = (
            None
            if policy is None
            else SourceWeights(policy, [*data.source_held_out], delay=delay + 1)
        )
        self.texts = (
            PromptFrontier(len(data.plain_text), self.config.seed, Stream.PLAIN_TEXT.value)
            if self.config.distill.plain_text_sequences
            else None
        )
        self.supervision: Supervision | None = None
        self._clock = clock
        self._watched: dict[str, WatchedWorkers] = {}
        self._sampled = {"student": 0, "teacher": 0}
        self._fed: dict[str, list[str]] = {}
        self._text: dict[str, float] = {}

    def begin(self, step: int) -> None:
        """Let the pools work towards this step; every student worker holds version `step`."""
        pools = {
            "student_rollout": self.pools.students.workers,
            "teacher_rollout": self.pools.teachers.workers,
            "teacher_scoring": self.pools.scorers.workers,
        }
        if self.is_asynchronous:  # a slice of decoding is no call that could be made again
            placed = self.pools.placed
            pools |= {name: placed[name].workers for name in pools.keys() & placed.keys()}
        self._watched = {
            name: WatchedWorkers(workers, self._clock) for name, workers in pools.items()
        }
        self._learner_clock = PoolClock([LEARNER], self._clock())

    @abstractmethod
    def take(self, step: int) -> Sequence[ScoredChunk]:
        """What this step learns from, once it is written and read by the teacher."""

    def learn(self, step: int, scored: Sequence[ScoredChunk]) -> StepResult:
        """The step itself; the other pools go on meanwhile."""
        with self.context.timings.phase("learner"):
            self._learner_clock.begin(LEARNER, self._clock())
            references = self.pools.learner.start_step(step, [*scored, *self._plain_text()])
            # The learner is at work: looking at the text costs no time now.
            self._text = text_metrics(t for part in scored for t in part.chunk.trajectories)
            self._wait(references, what="the learner's step")
            result = self.pools.learner.finish_step(step, references)
            self._learner_clock.end(LEARNER, self._clock(), busy_seconds=result.seconds)
        self._learner_clock.hand_on(
            num_tokens=result.num_response_tokens,
            num_sequences=sum(len(part.chunk.trajectories) for part in scored),
        )
        return result

    @abstractmethod
    def publish(self, version: int) -> None:
        """Send the student's new weights to its rollout workers."""

    @abstractmethod
    def wait_for_weight_sync(self) -> None:
        """Return once every student worker holds what was published last."""

    def on_metrics(self, measured: Mapping[str, float]) -> None:
        """Take in what was measured on held-out data.

        The pools' time in measurements is not the run's own: it is left out of their activity.
        """
        if measured:
            self.pop_activity()

    def measures_sources(self, done: int) -> bool:
        """Whether the weights of the prompts' sources follow what is measured after this step."""
        return self.source_weights is not None and self.source_weights.is_due(done)

    def follow_sources(self, done: int, ratios: Mapping[str, float]) -> dict[str, float]:
        """Draw by new weights; returns them, and what they follow, as metrics.

        ratios: source -> perplexity of the student over that of the teacher.
        """
        assert self.source_weights is not None, "ask measures_sources first"
        measured = {f"source_perplexity_ratio/{name}": ratio for name, ratio in ratios.items()}
        return measured | self.source_weights.observe(done, ratios)

    def _weights(self, step: int) -> list[float] | None:
        """Weights of the prompts' sources for a step; None: those that are configured."""
        return None if self.source_weights is None else self.source_weights.at(step)

    def _plain_text(self) -> list[ScoredChunk]:
        """The step's plain text, a chunk for each learner rank."""
        if self.texts is None:
            return []
        taken = self.texts.take(self.config.distill.plain_text_sequences)
        rows = self._feed(Stream.PLAIN_TEXT.value, [self.data.plain_text[at] for at in taken])
        ranks = self.config.pools.learner.count
        dealt = TrajectoryChunk.deal(rows, Stream.PLAIN_TEXT, ranks)
        return [ScoredChunk(chunk, None) for chunk in dealt]

    def _shared_state(self) -> dict[str, Any]:
        """What both kinds of streams keep in a checkpoint."""
        kept = {"sources": self.source_weights, Stream.PLAIN_TEXT.value: self.texts}
        return {name: part.state() for name, part in kept.items() if part is not None}

    def _restore_shared(self, state: Mapping[str, Any]) -> None:
        if self.source_weights is not None:
            self.source_weights.restore(state["sources"])
        if self.texts is not None:
            self.texts.restore(state[Stream.PLAIN_TEXT.value])

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The position from which the steps not yet learned from are fed again."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a position that `state` returned."""

    @abstractmethod
    def release_worker(self, pool: str, worker: int) -> bool:
        """Give this worker nothing more and take back what it has; True once it may be ended.

        Asked between `take` and `learn`, as is `admit_workers`.
        """

    @abstractmethod
    def forget_worker(self, pool: str, worker: int) -> None:
        """This worker is lost: what it had under way is given to others, or made again."""

    @abstractmethod
    def admit_workers(self) -> None:
        """Workers have joined: let them take part, a student worker from the next publish on."""

    @abstractmethod
    def bring_weights(self) -> None:
        """Let workers that have joined have what was published last; the learner is idle."""

    @abstractmethod
    def abandon(self) -> None:
        """These streams end here: nothing of what is under way is waited for."""

    def pop_activity(self) -> dict[str, PoolActivity]:
        """What every pool did since this was last asked."""
        queued = self._queued()
        activity = {
            pool: watched.pop_activity(queued=queued.get(pool, 0))
            for pool, watched in self._watched.items()
            if watched.count
        }
        return activity | {"learner": self._learner_clock.pop(self._clock())}

    def pop_counts(self) -> dict[str, float]:
        """Response tokens that each model sampled since this was last asked, and what the text of
        the last step looks like, as metrics."""
        counts, self._sampled = self._sampled, {"student": 0, "teacher": 0}
        sampled = {f"sampled_tokens/{author}": float(count) for author, count in counts.items()}
        text, self._text = self._text, {}
        return sampled | text

    def pop_prompts(self) -> dict[str, list[str]]:
        """Prompt ids of each stream that was fed since this was last asked: one step's."""
        fed, self._fed = self._fed, {}
        return fed

    @abstractmethod
    def _wait(self, references: Sequence[Reference], *, what: str) -> None:
        """Return once these calls have ended; the other pools' calls are heard of meanwhile.

        Raises: WorkerError if a worker died; DeadlineError.
        """

    def _notice_losses(self) -> None:
        if self.supervision is not None:
            self.supervision.notice()

    def _lose(self, lost: WorkerLostError) -> None:
        if self.supervision is None:
            raise lost
        self.supervision.lose(lost)

    def _lose_late(self, late: DeadlineError) -> None:
        """Workers that have missed a deadline hang: they are lost.

        Raises: `late` if it names none.
        """
        if not late.late:
            raise late
        for name in late.late:
            self._lose(WorkerLostError(f"{name} hangs: {late}", name))

    def _leave_out(self, prompt: Prompt, lost: WorkerLostError) -> None:
        """Go on without a prompt that costs a worker each time it is answered."""
        self.context.view.note(
            f"prompt {prompt.prompt_id!r} is left out (faults.fatal_prompts): it costs a worker "
            f"each time it is answered, the last one so: {lost.brief}"
        )

    def _queued(self) -> dict[str, int]:
        """Items that wait before each pool; pools before which nothing can wait are left out."""
        return {}

    def _feed(self, stream: str, fed: Sequence[Trajectory]) -> Sequence[Trajectory]:
        self._fed.setdefault(stream, []).extend(trajectory.prompt_id for trajectory in fed)
        return fed

    def _count(self, author: str, written: Sequence[Trajectory]) -> Sequence[Trajectory]:
        self._sampled[author] += sum(trajectory.num_response_tokens for trajectory in written)
        return written

    def _sampling(self, stream: Stream) -> Sampling:
        sampling = self.config.rollout.sampling
        return Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_response_tokens=sampling.longest(stream.side),
        )

    def _sequences(self, stream: Stream) -> int:
        return self.config.distill.sequences(stream.side)
