"""Workers that start when a test says so, in place of a cluster's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_system.cluster import WorkerRequest
from distill_system.errors import WorkerLostError
from distill_system.workers import ElasticWorkers, StartedWorker


class LateStart:
    """Implements elastic_pools.Starting: ready once is_ready is set, given up with `error`.

    It refuses to be asked after its end.
    """

    def __init__(
        self,
        request: WorkerRequest,
        worker_id: int,
        arguments: Mapping[str, Any],
        place: Any = None,
    ):
        self.request = request
        self.place = place
        self.is_placed = False
        self.worker_id = worker_id
        self.arguments = arguments
        self.is_ready = False
        self.error: Exception | None = None
        self.cluster_has = ""
        self.is_over = False

    @property
    def name(self) -> str:
        return f"{self.request.name}-{self.worker_id}"

    @property
    def no_place(self) -> str:
        return self.cluster_has

    @property
    def is_unplaced(self) -> bool:
        return not self.is_placed

    def poll(self) -> StartedWorker | None:
        assert not self.is_over, f"{self.name} is polled after its end"
        if self.error is not None:
            self.is_over = True
            raise self.error
        if not self.is_ready:
            return None
        worker = self.request.worker_class(**self.arguments)
        return StartedWorker(self.worker_id, worker, self.place)

    def cancel(self) -> None:
        assert not self.is_over, f"{self.name} is cancelled after its end"
        self.is_over = True


class LateStarts:
    """Implements elastic_pools.Starts; every start it began is in `starts`.

    dead: workers that the next pop_lost tells of.
    """

    def __init__(self) -> None:
        self.starts: list[LateStart] = []
        self.dead: list[WorkerLostError] = []

    def pop_lost(self) -> list[WorkerLostError]:
        dead, self.dead = self.dead, []
        return dead

    def begin_worker(
        self,
        request: WorkerRequest,
        worker_id: int,
        arguments: Mapping[str, Any],
        place: Any = None,
    ) -> LateStart:
        expected = set(request.arguments[0])
        assert set(arguments) == expected, f"expected {expected}, got {set(arguments)}"
        start = LateStart(request, worker_id, arguments, place)
        assert start.name not in {other.name for other in self.starts}, "the id is given twice"
        self.starts.append(start)
        return start

    def adopt_worker(self, workers: ElasticWorkers, starting: LateStart) -> None:
        assert starting in self.starts, "another session began it"
        started = starting.poll()
        assert started is not None, f"{starting.name} is not ready"
        starting.is_over = True
        workers.add(started)
