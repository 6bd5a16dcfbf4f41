"""One worker that starts while a run goes on: the run polls it and never waits for it.

ASKED_FOR --placed--> LOADING --loaded--> READY --> the worker joins its group
    |                    |                  |
    '--------------------'------------------'--> GIVEN_UP: a deadline, an error, or cancel()
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any

import ray

from distill_system.cluster.liveness import LivenessMonitor
from distill_system.cluster.peers import start_worker
from distill_system.cluster.placement import (
    Placement,
    WorkerRequest,
    bundle_of,
    describe_supply,
    release_placements,
    request_placements,
)
from distill_system.cluster.waiting import wait_for
from distill_system.config.pools import DeadlinesConfig
from distill_system.errors import DeadlineError, DistillError, ResourceError
from distill_system.workers import StartedWorker

NO_PLACE_SECONDS = 1.0
"""Where the cluster has room, it gives a place within less than this."""


class StartStage(StrEnum):
    """The states of a worker that starts; the module's picture shows how they follow."""

    ASKED_FOR = "asked for"
    LOADING = "loading"
    READY = "ready"
    GIVEN_UP = "given up"


class StartingWorker:
    """Requests a place, starts a process there, waits until its model is loaded.

    Each `poll` advances by at most one state. Until the worker is placed, the cluster's autoscaler
    counts its request as demand.

    place: of a worker before it, which this one takes over; None asks the cluster for a new one.
    """

    def __init__(
        self,
        request: WorkerRequest,
        worker_id: int,
        arguments: Mapping[str, Any],
        deadlines: DeadlinesConfig,
        place: Placement | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.stage = StartStage.ASKED_FOR
        self._request = request
        self._arguments = dict(arguments)
        self._deadlines = deadlines
        self._stage_since = time.monotonic()
        self._takes_over = place is not None
        if place is None:
            single = _single_worker(request, self._arguments)
            [place] = request_placements(single, first_id=worker_id)
        self._placement = place.again() if self._takes_over else place
        self._no_place = ""
        self._handle: Any = None
        self._loaded: Any = None  # the reference of the worker's first call, `ready`

    @property
    def name(self) -> str:
        """The worker's name in messages."""
        return f"{self._request.name}-{self.worker_id}"

    @property
    def no_place(self) -> str:
        """What the cluster has, once it has found no place for this worker; else ""."""
        return self._no_place

    @property
    def is_unplaced(self) -> bool:
        """Whether the cluster has not placed it, or had not when it was given up."""
        return self._handle is None

    def poll(self) -> StartedWorker | None:
        """Advance without waiting; the worker once it is ready, None before.

        Raises: ResourceError, DeadlineError or what loading raised; the worker is then given up,
        its process ended and its place returned.
        """
        try:
            return self._advance()
        except DistillError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End the process; only for a worker that has joined no group.

        A place of its own goes back to the cluster, one that it took over stays its group's.
        """
        if self.stage is StartStage.GIVEN_UP:
            return
        self.stage = StartStage.GIVEN_UP
        if self._handle is not None:
            ray.kill(self._handle)
        if not self._takes_over:
            release_placements([self._placement])

    def _advance(self) -> StartedWorker | None:
        assert self.stage is not StartStage.GIVEN_UP, f"{self.name} is given up"
        if self.stage is StartStage.ASKED_FOR:
            self._start_if_placed()
        elif self.stage is StartStage.LOADING:
            self._check_if_loaded()
        if self.stage is StartStage.READY:
            return StartedWorker(self.worker_id, self._handle, self._placement)
        return None

    def _start_if_placed(self) -> None:
        now, limit = time.monotonic(), self._deadlines.resources_seconds
        if self._placement.is_placed:
            self._handle = start_worker(
                self._request, self.worker_id, self._arguments, self._placement
            )
            self._loaded = self._handle.ready.remote()
            # Each state has a deadline of its own: loading is timed from here.
            self.stage, self._stage_since, self._no_place = StartStage.LOADING, now, ""
        elif not self._no_place and now - self._stage_since > NO_PLACE_SECONDS:
            self._no_place = f"no place for {bundle_of(self._request.pool)}: {describe_supply()}"
        elif now - self._stage_since > limit:
            raise ResourceError(
                f"the cluster did not place {bundle_of(self._request.pool)} for {self.name} within "
                f"deadlines.resources_seconds={limit:g}: {describe_supply()}. Add nodes, or ask "
                "for fewer workers"
            )

    def _check_if_loaded(self) -> None:
        limit = self._deadlines.start_seconds
        if ray.wait([self._loaded], timeout=0, fetch_local=False)[0]:
            # Done may mean failed: fetching the result raises what loading raised. The worker has
            # a monitor of its own, so that its death is no death of a worker of the run.
            monitor = LivenessMonitor({self.name: self._handle})
            wait_for([self._loaded], monitor, what="a new worker", seconds=1.0)
            self.stage = StartStage.READY
        elif time.monotonic() - self._stage_since > limit:
            raise DeadlineError(
                f"{self.name} did not load its model within deadlines.start_seconds={limit:g}. "
                "Raise it, or look at the worker's log in Ray's dashboard"
            )


def _single_worker(request: WorkerRequest, arguments: dict[str, Any]) -> WorkerRequest:
    """The request for one more worker of a pool."""
    assert not request.gang, "a gang keeps its size"
    assert request.colocate_with is None, "colocated pools keep their size"
    return replace(request, arguments=[arguments])
