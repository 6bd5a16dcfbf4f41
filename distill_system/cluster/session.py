"""A Ray cluster for the length of a `with` block: joined or started, and left as it was found."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

import ray

from distill_system.cluster.liveness import LivenessMonitor
from distill_system.cluster.placement import (
    Placement,
    WorkerRequest,
    bundle_of,
    describe_supply,
    release_placements,
    request_placements,
    start_process,
)
from distill_system.cluster.starting import StartingWorker
from distill_system.cluster.workers import RayWorkers
from distill_system.config import RunConfig
from distill_system.config.pools import PoolConfig
from distill_system.errors import ResourceError

PLACED_SECONDS = 1.0
"""What the cluster has room for is placed sooner, and nothing is said of it."""

POLL_SECONDS = 5.0
CONNECT_SECONDS = 10.0


class ClusterSession:
    """Starts workers on the cluster of RAY_ADDRESS, or on a local one that ends with the block."""

    def __init__(self, config: RunConfig, *, say: Callable[[str], None]) -> None:
        self.config = config
        self.say = say
        self.monitor = LivenessMonitor()
        self.groups: list[RayWorkers] = []
        self.starting: list[StartingWorker] = []

    def __enter__(self) -> Self:
        address = os.environ.get("RAY_ADDRESS")
        if address:
            _require_answer(address)
        assert not ray.is_initialized(), "a process has one session at a time"
        try:
            with _signal_handlers_kept():
                _connect(address, self.config)
        except BaseException:
            _shut_down()  # what stands already of a local cluster
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # With its driver a session's workers and placements end too. To give them back one by one
        # would wait for a cluster that may be ending as well, as after SIGTERM to all processes.
        _shut_down()

    def start_workers(self, request: WorkerRequest) -> RayWorkers:
        """Place and start a pool; returns at once after placement, while the workers load.

        Raises: ResourceError when the cluster cannot place them before the deadline.
        """
        return self.start_pools([request])[0]

    def start_pools(self, requests: Sequence[WorkerRequest]) -> list[RayWorkers]:
        """Place all workers of several pools, then start them; returns while they load.

        All places are asked for at once, so that the cluster's autoscaler sees the whole demand,
        and nothing loads unless everything has its place.

        Raises: ResourceError when the cluster cannot place them before the deadline.
        """
        placements = _ask_for_all(requests)
        try:
            self._wait_until_placed(requests, placements)
        except BaseException:
            for name in _hosts(requests):
                release_placements(placements[name])
            raise
        started = [self._start(request, placements) for request in requests]
        self.groups += started
        return started

    def begin_worker(
        self, request: WorkerRequest, worker_id: int, arguments: Mapping[str, Any]
    ) -> StartingWorker:
        """Begin to place and load one more worker of a pool, in the background; see StartingWorker.

        Its arguments are `arguments`; those of the request are of the workers before it.
        """
        starting = StartingWorker(request, worker_id, arguments, self.config.deadlines)
        self.starting.append(starting)
        return starting

    def adopt_worker(self, workers: RayWorkers, starting: StartingWorker) -> None:
        """Take a worker into its group; it must be ready."""
        started = starting.poll()
        assert started is not None, f"{starting.name} is not ready"
        self.starting.remove(starting)
        workers.add(started)

    def has_room_for(self, pool: PoolConfig, copies: int) -> bool:
        """Whether so many copies of a pool fit the whole cluster at once, were it empty."""
        has = ray.cluster_resources()
        wanted = {name: copies * pool.count * amount for name, amount in bundle_of(pool).items()}
        return all(has.get(name, 0.0) >= amount for name, amount in wanted.items())

    def stop_workers(self, workers: RayWorkers) -> None:
        """End a pool before the session ends; one that has ended already stays so."""
        with suppress(ValueError):  # another thread may be ending it too
            self.groups.remove(workers)
        workers.stop()

    def stop_all(self) -> None:
        """End every pool, and every worker that is still starting."""
        self._cancel_starting()
        for workers in list(self.groups):
            self.stop_workers(workers)

    def abandon_all(self) -> None:
        """End every process, and with it every wait for one; the session can start no more."""
        self._cancel_starting()
        for workers in list(self.groups):
            workers.kill()

    def _cancel_starting(self) -> None:
        starting, self.starting = self.starting, []
        for worker in starting:
            worker.cancel()

    def _start(
        self, request: WorkerRequest, placements: Mapping[str, Sequence[Placement]]
    ) -> RayWorkers:
        """Begin a pool's processes in their places, its own or those of the pool it shares."""
        places = placements[request.colocate_with or request.name]
        handles = [
            start_process(request, worker_id, arguments, placement)
            for worker_id, (arguments, placement) in enumerate(
                zip(request.arguments, places, strict=True)
            )
        ]
        return RayWorkers(
            request.name,
            handles,
            [] if request.colocate_with else places,
            call_seconds=self.config.deadlines.call_seconds,
            monitor=self.monitor,
        )

    def _wait_until_placed(
        self, requests: Sequence[WorkerRequest], placements: Mapping[str, Sequence[Placement]]
    ) -> None:
        limit = self.config.deadlines.resources_seconds
        deadline = time.monotonic() + limit
        # A gang's placements share one promise.
        every = list({placement.placed: None for pool in placements.values() for placement in pool})
        patience = PLACED_SECONDS
        while True:
            left = max(0.0, deadline - time.monotonic())
            placed, unplaced = ray.wait(every, num_returns=len(every), timeout=min(patience, left))
            if not unplaced:
                return
            wanted, supply = _describe_demand(requests, placements, set(placed)), describe_supply()
            if time.monotonic() >= deadline:
                raise ResourceError(
                    f"the cluster did not place {wanted} within {limit:.0f} s: {supply}. Lower "
                    "pools.*.count, .cpus or .gpus, add nodes, or raise deadlines.resources_seconds"
                )
            self.say(f"waiting for resources: want {wanted}; {supply}")
            patience = POLL_SECONDS


def _ask_for_all(requests: Sequence[WorkerRequest]) -> dict[str, list[Placement]]:
    """Places of every pool that does not stand in another's; by the pool's name."""
    return {
        name: request_placements(
            host, beside=[other for other in requests if other.colocate_with == name]
        )
        for name, host in _hosts(requests).items()
    }


def _hosts(requests: Sequence[WorkerRequest]) -> dict[str, WorkerRequest]:
    return {request.name: request for request in requests if request.colocate_with is None}


def _describe_demand(
    requests: Sequence[WorkerRequest],
    placements: Mapping[str, Sequence[Placement]],
    placed: Collection[ray.ObjectRef[Any]],
) -> str:
    """What is not placed yet, pool by pool, with how much of it is."""
    parts = []
    for name, host in _hosts(requests).items():
        beside = [other for other in requests if other.colocate_with == name]
        done = sum(placement.placed in placed for placement in placements[name])
        if done < len(placements[name]):
            pools = " and ".join([name, *(other.name for other in beside)])
            bundle = bundle_of(host.pool, *(other.pool for other in beside))
            part = f"{len(placements[name])} x {bundle} for {pools}"
            part += " together" if host.gang and len(placements[name]) > 1 else ""
            parts.append(part + (f" ({done} placed)" if done else ""))
    return ", ".join(parts)


def _connect(address: str | None, config: RunConfig) -> None:
    try:
        ray.init(
            address="auto" if address else "local",  # auto is what RAY_ADDRESS says
            namespace=f"distill-{config.name}",
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address else {"include_dashboard": config.cluster.dashboard}),
        )
    except Exception as error:  # of a cluster that did not stand in time Ray says no more
        what = f"join the cluster of RAY_ADDRESS={address}" if address else "start a local cluster"
        raise ResourceError(f"Ray could not {what}: {error}") from error


def _require_answer(address: str) -> None:
    """Ray itself goes on asking a host:port that does not answer for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not port.isdigit():
        return  # not of the form host:port
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {error}. Start it, or unset "
            "RAY_ADDRESS to start a local one"
        ) from error


def _shut_down() -> None:
    with _signal_handlers_kept():
        ray.shutdown()


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Ray puts a SIGTERM handler of its own over ours; as it ends it takes away even ours.

    What Python then calls its handler is no longer the system's: it has to be set again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
