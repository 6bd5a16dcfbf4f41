"""Teacher scorers that are given finished trajectories in chunks, as they arrive.

A chunk holds trajectories of one stream that one step learns from. It goes to a free scorer when it
holds a budget of tokens, when nothing more comes for its step, or when its first trajectory has
waited long enough.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from distill_system.config.objective import TeacherNeeds
from distill_system.records import ScoredChunk, Stream, TrajectoryChunk
from distill_system.streams.in_flight import Entry, InFlight
from distill_system.streams.watched_workers import WatchedWorkers
from distill_system.workers import Reference

CHUNKS_IN_FLIGHT = 2
"""Calls at each scorer: one that runs and one behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringCall:
    """A chunk at a scorer, known by its receipt."""

    worker: int
    stream: Stream
    entries: tuple[Entry, ...]


class Scorers:
    """Cuts what has arrived into chunks and keeps every scorer busy.

    buffers: of the streams that are read.
    needs: what the objective asks of the teacher, per stream; where it asks nothing, nothing is
        scored.
    max_tokens: prompt and response tokens after which a chunk is full.
    max_sequences: most trajectories of a chunk per stream, so that every learner rank has one.
    max_wait_seconds: longest wait of a trajectory while a scorer is free.
    clock: seconds that never run backwards.
    """

    def __init__(
        self,
        workers: WatchedWorkers,
        buffers: Mapping[Stream, InFlight],
        *,
        needs: Mapping[Stream, TeacherNeeds],
        max_tokens: int,
        max_sequences: Mapping[Stream, int],
        max_wait_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self.workers = workers
        self._buffers = buffers
        self._needs = needs
        self._max_tokens = max_tokens
        self._max_sequences = max_sequences
        self._max_wait_seconds = max_wait_seconds
        self._clock = clock
        self._members = set(workers.members)
        self._calls: dict[Reference, ScoringCall] = {}

    @property
    def members(self) -> frozenset[int]:
        """Scorers that are given chunks."""
        return frozenset(self._members)

    @property
    def references(self) -> list[Reference]:
        """All scoring calls in flight."""
        return list(self._calls)

    @property
    def num_waiting(self) -> int:
        """Trajectories that no scorer has taken yet."""
        return sum(
            len(entries) for buffer in self._buffers.values() for _, entries in buffer.waiting()
        )

    def begin(self) -> float | None:
        """Hand full, complete and long-waiting chunks to free scorers, earlier steps first.

        Returns the seconds until the next one has waited long enough, None if none waits for time.
        """
        now, next_due = self._clock(), list[float]()
        for step, stream, waiting in self._waiting():
            while waiting:
                left = next(iter(waiting.values())).arrived_at + self._max_wait_seconds - now
                is_complete = self._buffers[stream].is_complete(step)
                if not (is_complete or left <= 0 or self._is_full(waiting, stream)):
                    next_due.append(left)
                    break
                if not self._begin_chunk(waiting, stream):
                    return min(next_due, default=None)
        return min(next_due, default=None)

    def collect(self, receipts: Sequence[Reference]) -> None:
        """Take in scoring calls that have ended.  Raises: a scorer's error; nothing has changed."""
        self.workers.finish(receipts, what="teacher scores")
        for receipt in receipts:
            self._take_in(self._calls.pop(receipt))

    def _take_in(self, call: ScoringCall) -> None:
        self._buffers[call.stream].scored(call.entries)
        self.workers.hand_on(
            num_tokens=sum(entry.num_tokens for entry in call.entries),
            num_sequences=len(call.entries),
        )
        if call.worker not in self._members and not self._loads()[call.worker]:
            self.workers.leave(call.worker)

    def lose(self, worker: int) -> None:
        """A scorer is lost: what it had is scored again."""
        lost = {receipt: call for receipt, call in self._calls.items() if call.worker == worker}
        for receipt, call in lost.items():
            del self._calls[receipt]
            self._buffers[call.stream].score_again(call.entries)
        self._members.discard(worker)
        self.workers.leave(worker)

    def texts_of(self, name: str) -> set[tuple[Stream, int]]:
        """Stream and number of what a scorer, called pool-id, reads now."""
        number = name.rpartition("-")[2]
        calls = [call for call in self._calls.values() if str(call.worker) == number]
        return {(call.stream, entry.number) for call in calls for entry in call.entries}

    def join(self, worker: int) -> None:
        """A scorer has joined the group."""
        self._members.add(worker)
        self.workers.join(worker)

    def leave(self, worker: int) -> bool:
        """Give a scorer nothing more; True once nothing is in flight there."""
        is_idle = not self._loads()[worker]
        if worker in self._members:
            self._members.remove(worker)
            if is_idle:
                self.workers.leave(worker)
        return is_idle

    def _waiting(self) -> list[tuple[int, Stream, Mapping[int, Entry]]]:
        found = [
            (step, stream, entries)
            for stream, buffer in self._buffers.items()
            for step, entries in buffer.waiting()
        ]
        return sorted(found, key=lambda each: each[:2])

    def _loads(self) -> Counter[int]:
        """Calls in flight at each scorer that has any."""
        return Counter(call.worker for call in self._calls.values())

    def _is_full(self, waiting: Mapping[int, Entry], stream: Stream) -> bool:
        if len(waiting) >= self._max_sequences[stream]:
            return True
        return sum(entry.num_tokens for entry in waiting.values()) >= self._max_tokens

    def _begin_chunk(self, waiting: Mapping[int, Entry], stream: Stream) -> bool:
        """Cut a chunk and hand it out; False if no scorer is free."""
        needs, worker = self._needs[stream], self._find_free()
        if not needs.anything:
            entries = self._cut(waiting, stream)
            self._buffers[stream].score(entries, ScoredChunk(_chunk_of(entries, stream), None))
            return True
        if worker is None:
            return False
        entries = self._cut(waiting, stream)
        chunk = _chunk_of(entries, stream)
        receipt, targets = self.workers.start_with_receipt(
            worker, "score_with_receipt", chunk, needs
        )
        self._calls[receipt] = ScoringCall(worker=worker, stream=stream, entries=tuple(entries))
        self._buffers[stream].score(entries, ScoredChunk(chunk, targets))
        return True

    def _find_free(self) -> int | None:
        """The least loaded scorer that has room for a call; None if none has."""
        loads = self._loads()
        free = [(loads[each], each) for each in self._members if loads[each] < CHUNKS_IN_FLIGHT]
        return min(free)[1] if free else None

    def _cut(self, waiting: Mapping[int, Entry], stream: Stream) -> list[Entry]:
        """As many as the budgets allow, at least one."""
        cut: list[Entry] = []
        num_tokens = 0
        for entry in islice(waiting.values(), self._max_sequences[stream]):
            num_tokens += entry.num_tokens
            if cut and num_tokens > self._max_tokens:
                break
            cut.append(entry)
        return cut


def _chunk_of(entries: Sequence[Entry], stream: Stream) -> TrajectoryChunk:
    written = tuple(entry.trajectory for entry in entries if entry.trajectory is not None)
    assert len(written) == len(entries), "what waits for a scorer is written"
    return TrajectoryChunk(stream=stream, trajectories=written)
