"""One worker that starts in the background of a run, which looks after it without waiting."""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import ray

from distill_system.cluster.liveness import LivenessMonitor
from distill_system.cluster.placement import (
    WorkerRequest,
    bundle_of,
    describe_supply,
    release_placements,
    request_placements,
    start_process,
)
from distill_system.cluster.waiting import wait_for
from distill_system.config.pools import DeadlinesConfig
from distill_system.errors import DeadlineError, DistillError, ResourceError
from distill_system.workers import StartedWorker


class StartStage(StrEnum):
    """How far a worker has come."""

    ASKED_FOR = "asked for"
    LOADING = "loading"
    READY = "ready"
    GIVEN_UP = "given up"


class StartingWorker:
    """Asks for a place, loads there, is ready: one step further with each `poll` that can be made.

    Until it is placed the cluster's autoscaler sees it as demand.
    """

    def __init__(
        self,
        request: WorkerRequest,
        worker_id: int,
        arguments: Mapping[str, Any],
        deadlines: DeadlinesConfig,
    ) -> None:
        self.worker_id = worker_id
        self.stage = StartStage.ASKED_FOR
        self._request = request
        self._arguments = dict(arguments)
        self._deadlines = deadlines
        self._since = time.monotonic()
        [self._seat] = request_placements(_one_of(request, self._arguments))
        self._handle: Any = None
        self._loaded: Any = None

    @property
    def name(self) -> str:
        """The worker's name in messages."""
        return f"{self._request.name}-{self.worker_id}"

    def poll(self) -> StartedWorker | None:
        """The worker once it is ready, None before; does not wait. Call it until either comes.

        Raises: ResourceError, DeadlineError or what loading raised; the worker is then given up,
        its process ended and its place returned.
        """
        try:
            return self._go_on()
        except DistillError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End a worker that no group has taken in: its process ends, its place goes back."""
        if self.stage is StartStage.GIVEN_UP:
            return
        self.stage = StartStage.GIVEN_UP
        if self._handle is not None:
            ray.kill(self._handle)
        release_placements([self._seat])

    def _go_on(self) -> StartedWorker | None:
        assert self.stage is not StartStage.GIVEN_UP, f"{self.name} is given up"
        if self.stage is StartStage.ASKED_FOR:
            self._load_where_placed()
        elif self.stage is StartStage.LOADING:
            self._look_whether_loaded()
        if self.stage is StartStage.READY:
            return StartedWorker(self.worker_id, self._handle, self._seat)
        return None

    def _load_where_placed(self) -> None:
        now, limit = time.monotonic(), self._deadlines.resources_seconds
        if self._seat.is_placed:
            self._handle = start_process(self._request, self.worker_id, self._arguments, self._seat)
            self._loaded = self._handle.ready.remote()
            self.stage, self._since = StartStage.LOADING, now
        elif now - self._since > limit:
            raise ResourceError(
                f"the cluster did not place {bundle_of(self._request.pool)} for {self.name} within "
                f"deadlines.resources_seconds={limit:g}: {describe_supply()}"
            )

    def _look_whether_loaded(self) -> None:
        limit = self._deadlines.start_seconds
        if ray.wait([self._loaded], timeout=0, fetch_local=False)[0]:
            monitor = LivenessMonitor({self.name: self._handle})
            wait_for([self._loaded], monitor, what="a new worker", seconds=1.0)  # raises its error
            self.stage = StartStage.READY
        elif time.monotonic() - self._since > limit:
            raise DeadlineError(
                f"{self.name} did not load its model within deadlines.start_seconds={limit:g}"
            )


def _one_of(request: WorkerRequest, arguments: dict[str, Any]) -> WorkerRequest:
    """The request of one more worker of a pool."""
    assert not request.gang, "a gang keeps its size"
    assert request.colocate_with is None, "workers that share places keep their number"
    return WorkerRequest(
        name=request.name,
        worker_class=request.worker_class,
        arguments=[arguments],
        pool=request.pool,
        environment=request.environment,
    )
