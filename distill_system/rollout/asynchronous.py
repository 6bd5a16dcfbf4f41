"""Continuous rollouts: prompts in one by one, trajectories out as each is finished.

No engine waits for a batch: each worker that has something to write has slices of decoding under
way, one running and one behind it, so that it goes on while the driver is busy elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from distill_system.records import Trajectory
from distill_system.rollout.worker import DecodeSlice, GenerationRequest
from distill_system.workers import CallWatch, Reference, Workers

SLICES_AHEAD = 2
NO_VERSION = -(10**9)
"""What a worker holds that has joined and received no weights yet."""


@dataclass(slots=True)
class WorkerState:
    """One worker as the driver knows it.

    requests: for its next slice.  under_way: requests it was given and has not answered, by name.
    calls: its slices under way, the first of which ends first.
    version: the weights it last said it held.
    """

    requests: list[GenerationRequest] = field(default_factory=list)
    under_way: dict[str, GenerationRequest] = field(default_factory=dict)
    calls: deque[Reference] = field(default_factory=deque)
    version: int = 0


class AsynchronousRollouts:
    """Rollout workers that hold the same model, or versions of it.

    slice_seconds: how long a worker decodes before it hands out what is finished.
    version: the weights that all hold to begin with.  watch: hears of every slice.
    """

    def __init__(
        self,
        workers: Workers,
        watch: CallWatch,
        *,
        slice_seconds: float,
        version: int,
    ) -> None:
        self._workers = workers
        self._watch = watch
        self._slice_seconds = slice_seconds
        self._states = {worker: WorkerState(version=version) for worker in workers.members}
        self._asked: dict[Reference, int] = {}

    @property
    def references(self) -> list[Reference]:
        """The slices that end next, one of each worker that writes."""
        return [state.calls[0] for state in self._states.values() if state.calls]

    @property
    def num_under_way(self) -> int:
        """Requests that are not answered."""
        return sum(len(state.under_way) for state in self._states.values())

    def find_free(self, suits: Callable[[int], bool]) -> tuple[int, int] | None:
        """Worker and version of the least loaded worker whose version suits.

        None if none does, or if it has more than its share already: a version does not reach all
        workers at once, and the first that holds it must not get what is meant for all.
        """
        suiting: dict[int, bool] = {}
        best: tuple[int, int, int] | None = None
        total = count = 0
        for worker, state in self._states.items():
            if state.version == NO_VERSION:
                continue  # it has no share of what is given out yet
            load = len(state.under_way)
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

    def give(self, worker: int, name: str, request: GenerationRequest) -> None:
        """A request for this worker's next slice; the trajectory that answers it has this name."""
        state = self._states[worker]
        assert name not in state.under_way, f"{name} was asked for before"
        state.requests.append(request)
        state.under_way[name] = request

    def begin(self, now: float) -> None:
        """Begin slices wherever there is something to write, up to two at each worker."""
        for worker, state in self._states.items():
            while state.under_way and len(state.calls) < SLICES_AHEAD:
                self._begin_slice(worker, state, now)

    def collect(self, references: Sequence[Reference], now: float) -> list[Trajectory]:
        """What slices that are done have finished, in the order of the references.

        Raises: what a worker raised.
        """
        workers = [self._asked.pop(reference) for reference in references]
        said = self._workers.finish(references, what="rollouts")
        for worker, reference, part in zip(workers, references, said, strict=True):
            self._hear(worker, reference, part, now)
        return [trajectory for part in said for trajectory in part.trajectories]

    def _hear(self, worker: int, reference: Reference, said: DecodeSlice, now: float) -> None:
        state = self._states[worker]
        ended = state.calls.popleft()
        assert ended == reference, "a worker's slices end in their order"
        self._watch.end(worker, now, busy_seconds=said.busy_seconds)
        self._watch.hand_on(
            num_tokens=sum(trajectory.num_response_tokens for trajectory in said.trajectories),
            num_sequences=len(said.trajectories),
        )
        for trajectory in said.trajectories:
            del state.under_way[trajectory.trajectory_id]
        state.version = max(state.version, said.version)  # a slice may be heard of late

    def take_in(self, worker: int, now: float, *, version: int) -> None:
        """A worker has joined the group; it holds this version."""
        self._states[worker] = WorkerState(version=version)
        self._watch.join(worker, now)

    def release(self, worker: int, now: float) -> dict[str, GenerationRequest]:
        """Let a worker go; the requests that it leaves unanswered, by name."""
        state = self._states.pop(worker)
        for call in state.calls:
            del self._asked[call]
        self._watch.leave(worker, now)
        return state.under_way

    @property
    def workers(self) -> frozenset[int]:
        """Workers that are given requests."""
        return frozenset(self._states)

    def hold(self, worker: int, version: int) -> None:
        """A worker has received this version."""
        if worker in self._states:
            self._states[worker].version = version

    def _begin_slice(self, worker: int, state: WorkerState, now: float) -> None:
        requests, state.requests = state.requests, []
        call = self._workers.start(worker, "advance", requests, self._slice_seconds)
        self._watch.begin(worker, now)
        state.calls.append(call)
        self._asked[call] = worker
