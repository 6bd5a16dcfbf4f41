"""Rollout workers that are given prompts one by one and hand out each text as it is finished.

No engine waits for a batch: each worker that has something to write has two slices of decoding in
flight, one that runs and one behind it, so that it goes on while the driver is busy elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from distill_system.records import Trajectory
from distill_system.rollout import DecodeSlice, GenerationRequest
from distill_system.streams.in_flight import Entry, InFlight
from distill_system.streams.watched_workers import WatchedWorkers
from distill_system.workers import Reference

SLICES_IN_FLIGHT = 2
NO_VERSION = -(10**9)
"""What a worker holds that has joined and received no weights yet."""


@dataclass(slots=True)
class WorkerState:
    """One worker as the driver knows it; what it writes stands in the buffer.

    version: the weights it last said it held.
    written_tokens: what it had written by its last slice.
    barren_seconds: that it has decoded since, in slices that brought no token.
    requests: for its next slice.
    slices: calls in flight, the first of which ends first.
    """

    version: int
    written_tokens: int = -1
    barren_seconds: float = 0.0
    requests: list[GenerationRequest] = field(default_factory=list)
    slices: deque[Reference] = field(default_factory=deque)


class Writers:
    """Rollout workers that hold the same model, or versions of it.

    buffer: of the stream that they write.
    slice_seconds: how long a worker decodes before it hands out what is finished.
    version: the weights that all hold to begin with.
    clock: seconds that never run backwards.
    """

    def __init__(
        self,
        workers: WatchedWorkers,
        buffer: InFlight,
        *,
        slice_seconds: float,
        version: int,
        clock: Callable[[], float],
    ) -> None:
        self.workers = workers
        self._buffer = buffer
        self._slice_seconds = slice_seconds
        self._clock = clock
        self._states = {worker: WorkerState(version) for worker in workers.members}
        self._worker_of: dict[Reference, int] = {}

    @property
    def members(self) -> frozenset[int]:
        """Workers that are given prompts."""
        return frozenset(self._states)

    @property
    def references(self) -> list[Reference]:
        """The slices that end next, one of each worker that writes."""
        return [state.slices[0] for state in self._states.values() if state.slices]

    def find_free(self, suits: Callable[[int], bool]) -> tuple[int, int] | None:
        """Worker and version of the least loaded worker whose version suits.

        None if none does, or if it has more than its share already: a version does not reach all
        workers at once, and the first that holds it must not get what is meant for all.
        """
        suiting: dict[int, bool] = {}
        best: tuple[int, int, int] | None = None
        total = count = 0
        for worker, state in self._states.items():
            if state.version == NO_VERSION or self._buffer.holds_suspect(worker):
                continue  # it has no share of what is given out
            load = self._buffer.num_writing(worker)
            total, count = total + load, count + 1
            if best is not None and load >= best[0]:
                continue
            if state.version not in suiting:
                suiting[state.version] = suits(state.version)
            if suiting[state.version]:
                best = (load, worker, state.version)
        if best is None or best[0] * count > total:
            return None
        return best[1], best[2]

    def find_idle(self, suits: Callable[[int], bool]) -> int | None:
        """A worker that writes nothing and whose version suits; None if there is none."""
        for worker, state in self._states.items():
            if not self._buffer.num_writing(worker) and suits(state.version):
                return worker
        return None

    def write(self, worker: int, entry: Entry) -> None:
        """Let a worker write an entry from its next slice on."""
        assert entry.request is not None, "a row of data is written already"
        self._buffer.write(entry, worker)
        self._states[worker].requests.append(entry.request)

    def begin(self) -> None:
        """Begin slices wherever there is something to write, up to two at each worker."""
        for worker, state in self._states.items():
            while self._buffer.num_writing(worker) and len(state.slices) < SLICES_IN_FLIGHT:
                self._begin_slice(worker, state)

    def awaits(self, reference: Reference) -> bool:
        """Whether this slice is under way at a worker that is still there."""
        return reference in self._worker_of

    def collect(self, references: Sequence[Reference]) -> list[Trajectory]:
        """Take in slices that have ended; what they finished, in the order of the references.

        Raises: what a worker raised; nothing has changed then.
        """
        ended: list[DecodeSlice] = self.workers.finish(
            references, what="rollouts", busy_seconds=lambda decoded: decoded.busy_seconds
        )
        for reference, decoded in zip(references, ended, strict=True):
            self._take_in(self._worker_of.pop(reference), reference, decoded)
        return [trajectory for decoded in ended for trajectory in decoded.trajectories]

    def join(self, worker: int, *, version: int) -> None:
        """A worker has joined the group; it holds this version."""
        self._states[worker] = WorkerState(version)
        self.workers.join(worker)

    def leave(self, worker: int, *, is_lost: bool = False) -> None:
        """Let a worker go; what it was writing is handed back to the buffer."""
        for reference in self._states.pop(worker).slices:
            del self._worker_of[reference]
        self._buffer.hand_back(worker, is_lost=is_lost)
        self.workers.leave(worker)

    def hold(self, worker: int, version: int) -> None:
        """A worker has received this version."""
        if worker in self._states:
            self._states[worker].version = version

    def find_stuck(self, seconds: float) -> list[int]:
        """Workers that have decoded for longer than this, slice after slice, without a token."""
        return [w for w, state in self._states.items() if state.barren_seconds > seconds]

    def _begin_slice(self, worker: int, state: WorkerState) -> None:
        requests, state.requests = state.requests, []
        reference = self.workers.start(worker, "advance", requests, self._slice_seconds)
        state.slices.append(reference)
        self._worker_of[reference] = worker

    def _take_in(self, worker: int, reference: Reference, decoded: DecodeSlice) -> None:
        state = self._states[worker]
        ended = state.slices.popleft()
        assert ended == reference, "a worker's slices end in their order"
        self.workers.hand_on(
            num_tokens=sum(trajectory.num_response_tokens for trajectory in decoded.trajectories),
            num_sequences=len(decoded.trajectories),
        )
        for trajectory in decoded.trajectories:
            entry = self._buffer.find_writing(worker, trajectory.trajectory_id)
            self._buffer.arrive(entry, trajectory, self._clock())
        state.barren_seconds += decoded.busy_seconds
        if decoded.written_tokens != state.written_tokens:
            state.written_tokens, state.barren_seconds = decoded.written_tokens, 0.0
        # Weights may have reached the worker after this slice ended and before it was heard of.
        state.version = max(state.version, decoded.version)
