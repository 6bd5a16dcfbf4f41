"""Continuous rollouts: prompts in one by one, trajectories out as each is finished.

No engine waits for a batch: each worker that has something to write has slices of decoding under
way, one running and one behind it, so that it goes on while the driver is busy elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from distill_system.records import Trajectory
from distill_system.rollout.worker import Order, Slice
from distill_system.workers import CallWatch, Reference, Workers

SLICES_AHEAD = 2
NO_VERSION = -(10**9)
"""What a worker holds that has joined and received no weights yet."""


@dataclass(slots=True)
class _Desk:
    """One worker as the driver knows it.

    orders: for its next slice.  under_way: orders it was given and has not answered, by name.
    calls: its slices under way, the first of which ends first.
    version: the weights it last said it held.
    """

    orders: list[Order] = field(default_factory=list)
    under_way: dict[str, Order] = field(default_factory=dict)
    calls: deque[Reference] = field(default_factory=deque)
    version: int = 0


class ContinuousRollouts:
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
        self._desks = {worker: _Desk(version=version) for worker in workers.members}
        self._asked: dict[Reference, int] = {}

    @property
    def references(self) -> list[Reference]:
        """The slices that end next, one of each worker that writes."""
        return [desk.calls[0] for desk in self._desks.values() if desk.calls]

    @property
    def num_under_way(self) -> int:
        """Orders that are not answered."""
        return sum(len(desk.under_way) for desk in self._desks.values())

    def find_free(self, suits: Callable[[int], bool]) -> tuple[int, int] | None:
        """Worker and version of the least loaded worker whose version suits.

        None if none does, or if it has more than its share already: a version does not reach all
        workers at once, and the first that holds it must not get what is meant for all.
        """
        suiting: dict[int, bool] = {}
        best: tuple[int, int, int] | None = None
        total = count = 0
        for worker, desk in self._desks.items():
            if desk.version == NO_VERSION:
                continue  # it has no share of what is given out yet
            load = len(desk.under_way)
            total, count = total + load, count + 1
            if best is not None and load >= best[0]:
                continue
            if desk.version not in suiting:
                suiting[desk.version] = suits(desk.version)
            if suiting[desk.version]:
                best = (load, worker, desk.version)
        if best is None or best[0] * count > total:
            return None
        return best[1], best[2]

    def give(self, worker: int, name: str, order: Order) -> None:
        """An order for this worker's next slice; the trajectory that answers it has this name."""
        desk = self._desks[worker]
        assert name not in desk.under_way, f"{name} was ordered before"
        desk.orders.append(order)
        desk.under_way[name] = order

    def begin(self, now: float) -> None:
        """Begin slices wherever there is something to write, up to two at each worker."""
        for worker, desk in self._desks.items():
            while desk.under_way and len(desk.calls) < SLICES_AHEAD:
                self._begin_slice(worker, desk, now)

    def collect(self, references: Sequence[Reference], now: float) -> list[Trajectory]:
        """What slices that are done have finished, in the order of the references.

        Raises: what a worker raised.
        """
        workers = [self._asked.pop(reference) for reference in references]
        said = self._workers.finish(references, what="rollouts")
        for worker, reference, part in zip(workers, references, said, strict=True):
            self._hear(worker, reference, part, now)
        return [trajectory for part in said for trajectory in part.trajectories]

    def _hear(self, worker: int, reference: Reference, said: Slice, now: float) -> None:
        desk = self._desks[worker]
        ended = desk.calls.popleft()
        assert ended == reference, "a worker's slices end in their order"
        self._watch.end(worker, now, busy_seconds=said.busy_seconds)
        self._watch.hand_on(
            num_tokens=sum(trajectory.num_response_tokens for trajectory in said.trajectories),
            num_sequences=len(said.trajectories),
        )
        for trajectory in said.trajectories:
            del desk.under_way[trajectory.trajectory_id]
        desk.version = max(desk.version, said.version)  # a slice may be heard of late

    def take_in(self, worker: int, now: float, *, version: int) -> None:
        """A worker has joined the group; it holds this version."""
        self._desks[worker] = _Desk(version=version)
        self._watch.join(worker, now)

    def release(self, worker: int, now: float) -> dict[str, Order]:
        """Let a worker go; the orders that it leaves unanswered, by name."""
        desk = self._desks.pop(worker)
        for call in desk.calls:
            del self._asked[call]
        self._watch.leave(worker, now)
        return desk.under_way

    @property
    def workers(self) -> frozenset[int]:
        """Workers that are given orders."""
        return frozenset(self._desks)

    def hold(self, worker: int, version: int) -> None:
        """A worker has received this version."""
        if worker in self._desks:
            self._desks[worker].version = version

    def _begin_slice(self, worker: int, desk: _Desk, now: float) -> None:
        orders, desk.orders = desk.orders, []
        call = self._workers.start(worker, "advance", orders, self._slice_seconds)
        self._watch.begin(worker, now)
        desk.calls.append(call)
        self._asked[call] = worker
