"""Continuous scoring: finished trajectories in one by one, scored chunks out.

A chunk holds trajectories of one stream that one step learns from. It goes to a free scorer when it
holds a budget of tokens, when nothing more comes for it, or when its first trajectory has waited
long enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from distill_system.config.objective import TeacherNeeds
from distill_system.records import ScoredChunk, Stream, Trajectory, TrajectoryChunk
from distill_system.workers import CallWatch, Reference, Workers

CHUNKS_AHEAD = 2
"""Calls at each scorer: one that runs and one behind it."""


@dataclass(slots=True)
class _Group:
    """What one step learns from of one stream, as far as it is written.

    waiting: when each came that is not yet with a scorer, and what it is, in the order of arrival.
    """

    waiting: deque[tuple[float, Trajectory]] = field(default_factory=deque)
    is_closed: bool = False
    chunks: list[ScoredChunk] = field(default_factory=list)
    under_way: int = 0


class AsynchronousScoring:
    """Cuts what comes into chunks and keeps every scorer busy.

    needs: what the objective asks of the teacher, per stream; where it asks nothing, nothing is
        scored.
    max_tokens: prompt and response tokens after which a chunk is full.
    max_sequences: most trajectories of a chunk per stream, so that every learner rank has one.
    max_wait_seconds: longest wait of a trajectory while a scorer is free.
    watch: hears of every call.
    """

    def __init__(
        self,
        workers: Workers,
        watch: CallWatch,
        *,
        needs: Mapping[Stream, TeacherNeeds],
        max_tokens: int,
        max_sequences: Mapping[Stream, int],
        max_wait_seconds: float,
    ) -> None:
        self._workers = workers
        self._watch = watch
        self._needs = needs
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._max_wait_seconds = max_wait_seconds
        self._calls: dict[int, int] = dict.fromkeys(workers.members, 0)
        self._leaving: dict[int, int] = {}
        self._asked: dict[Reference, tuple[int, _Group, TrajectoryChunk]] = {}
        self._groups: dict[tuple[int, Stream], _Group] = {}

    @property
    def references(self) -> list[Reference]:
        """All scoring calls under way."""
        return list(self._asked)

    @property
    def num_waiting(self) -> int:
        """Trajectories that no scorer has taken yet."""
        return sum(len(group.waiting) for group in self._groups.values())

    def add(self, step: int, stream: Stream, trajectory: Trajectory, *, now: float) -> None:
        """A trajectory that this step learns from."""
        self._find(step, stream).waiting.append((now, trajectory))

    def close(self, step: int, stream: Stream) -> None:
        """Nothing more comes for this step: what is there need not wait for company."""
        self._find(step, stream).is_closed = True

    def begin(self, now: float) -> float | None:
        """Hand full, closed and long-waiting chunks to free scorers, earlier steps first.

        Returns the seconds until the next one has waited long enough, None if none waits for time.
        """
        next_due: float | None = None
        for (_, stream), group in sorted(self._groups.items()):
            while group.waiting:
                left = group.waiting[0][0] + self._max_wait_seconds - now
                if not (group.is_closed or left <= 0 or self._is_full(group, stream)):
                    next_due = left if next_due is None else min(next_due, left)
                    break
                if not self._begin_chunk(group, stream, now):
                    return next_due
        return next_due

    def collect(self, reference: Reference, now: float) -> None:
        """A scoring call is done; whoever is handed its result meets its error, if it has one."""
        worker, group, chunk = self._asked.pop(reference)
        group.under_way -= 1
        self._watch.end(worker, now)
        if worker in self._calls:
            self._calls[worker] -= 1
        else:
            self._leaving[worker] -= 1
            if self._leaving[worker] == 0:
                self._watch.leave(worker, now)
        self._watch.hand_on(num_tokens=chunk.num_tokens, num_sequences=len(chunk.trajectories))

    def is_scored(self, step: int, stream: Stream) -> bool:
        """Whether all that came for a step is scored."""
        group = self._find(step, stream)
        return not group.waiting and group.under_way == 0

    def take(self, step: int, stream: Stream) -> list[ScoredChunk]:
        """A step's scored chunks, the largest first."""
        group = self._groups.pop((step, stream))
        return sorted(group.chunks, key=lambda scored: -scored.chunk.num_tokens)

    def take_some(self, step: int, stream: Stream, max_tokens: int) -> list[ScoredChunk]:
        """Scored chunks of a step that is not due yet, of so many response tokens at most."""
        group, asked, taken = self._find(step, stream), set(self._asked), list[ScoredChunk]()
        for part in list(group.chunks):
            tokens = part.chunk.num_response_tokens
            if tokens <= max_tokens and part.targets not in asked:
                group.chunks.remove(part)
                taken.append(part)
                max_tokens -= tokens
        return taken

    def take_in(self, worker: int, now: float) -> None:
        """A scorer has joined the group."""
        self._calls[worker] = 0
        self._watch.join(worker, now)

    def release(self, worker: int, now: float) -> bool:
        """Give a scorer nothing more; True once nothing is under way there."""
        if worker in self._calls:
            self._leaving[worker] = self._calls.pop(worker)
            if self._leaving[worker] == 0:
                self._watch.leave(worker, now)
        return self._leaving[worker] == 0

    @property
    def workers(self) -> frozenset[int]:
        """Scorers that are given chunks."""
        return frozenset(self._calls)

    def _find(self, step: int, stream: Stream) -> _Group:
        return self._groups.setdefault((step, stream), _Group())

    def _is_full(self, group: _Group, stream: Stream) -> bool:
        tokens = sum(int(trajectory.token_ids.size) for _, trajectory in group.waiting)
        return tokens >= self._max_tokens or len(group.waiting) >= self._max_sequences[stream]

    def _begin_chunk(self, group: _Group, stream: Stream, now: float) -> bool:
        """Cut a chunk and hand it out; False if no scorer is free."""
        needs = self._needs[stream]
        free = [(calls, worker) for worker, calls in self._calls.items() if calls < CHUNKS_AHEAD]
        if needs.anything and not free:
            return False
        chunk = TrajectoryChunk(stream=stream, trajectories=tuple(self._cut(group, stream)))
        if not needs.anything:
            group.chunks.append(ScoredChunk(chunk, None))
            return True
        _, worker = min(free)
        call = self._workers.start(worker, "score", chunk, needs)
        self._calls[worker] += 1
        self._watch.begin(worker, now)
        self._asked[call] = (worker, group, chunk)
        group.under_way += 1
        group.chunks.append(ScoredChunk(chunk, call))
        return True

    def _cut(self, group: _Group, stream: Stream) -> list[Trajectory]:
        """As many as the budgets allow, at least one."""
        cut: list[Trajectory] = []
        tokens = 0
        while group.waiting and len(cut) < self._max_sequences[stream]:
            tokens += int(group.waiting[0][1].token_ids.size)
            if cut and tokens > self._max_tokens:
                break
            cut.append(group.waiting.popleft()[1])
        return cut
