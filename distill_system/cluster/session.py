"""A Ray cluster for the length of a `with` block: joins an existing one, or starts a local one.

On the way out, an existing cluster gets its resources back and a local one ends.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import ray
from ray.job_config import JobConfig

from distill_system.cluster.listening import listening_on, local_arguments
from distill_system.cluster.liveness import LivenessMonitor
from distill_system.cluster.peers import start_worker
from distill_system.cluster.placement import (
    NAMESPACE,
    Placement,
    WorkerRequest,
    bundle_of,
    describe_supply,
    release_placements,
    request_placements,
)
from distill_system.cluster.predecessors import wait_until_gone
from distill_system.cluster.ray_messages import RayMessages
from distill_system.cluster.ray_watch import RayWatch
from distill_system.cluster.reach import require_joinable
from distill_system.cluster.starting import StartingWorker
from distill_system.cluster.workers import RayWorkers
from distill_system.config import RunConfig
from distill_system.config.pools import PoolConfig
from distill_system.errors import ResourceError, WorkerLostError

PLACED_SECONDS = 1.0
"""Where the cluster has room, placement takes less than this; only longer waits are reported."""

POLL_SECONDS = 5.0
"""Time between two reports of what is not placed yet."""


class ClusterSession:
    """Starts workers on the cluster of RAY_ADDRESS, or on a local one that ends with the block.

    trains: the workers are those of the run itself, of which there is one driver at a time: in a
    joined cluster those of a driver before this one are waited for.
    """

    def __init__(
        self, config: RunConfig, *, notify: Callable[[str], None], trains: bool = False
    ) -> None:
        self.config = config
        self.namespace = _namespace(config, trains)
        self.notify = notify
        self.monitor = LivenessMonitor()
        self.groups: list[RayWorkers] = []
        self.starting: list[StartingWorker] = []
        self._requests: dict[str, WorkerRequest] = {}
        self._watch = RayWatch()
        self._messages = RayMessages()

    def __enter__(self) -> Self:
        address = os.environ.get("RAY_ADDRESS")
        require_joinable()
        assert not ray.is_initialized(), "a process has one session at a time"
        self._messages.begin()
        try:
            with _signal_handlers_kept():
                _connect(address, self.config, self.namespace)
            if address:
                wait_until_gone(self.namespace, notify=self.notify)
        except BaseException:
            _shut_down()  # a local cluster may have started in part
            self._messages.end()
            raise
        self._watch.begin()
        return self

    def __exit__(self, *exception: object) -> None:
        # Ray ends a driver's workers and placement groups when the driver leaves. Returning them
        # one by one could hang: after SIGTERM to every process the cluster is ending too.
        self._watch.expect_end()
        _shut_down()
        self._watch.stop()
        self._messages.end()

    def start_workers(self, request: WorkerRequest) -> RayWorkers:
        """Place and start one pool; see start_pools."""
        return self.start_pools([request])[0]

    def start_pools(self, requests: Sequence[WorkerRequest]) -> list[RayWorkers]:
        """Place all workers of several pools, then start them; returns while they load.

        All places are requested at once, so that the cluster's autoscaler sees the whole demand.
        No worker starts to load before every worker is placed.

        Raises: ResourceError if the cluster does not place them within deadlines.resources_seconds.
        """
        placements = _request_all(requests)
        try:
            self._wait_until_placed(requests, placements)
        except BaseException:
            for name in _hosts(requests):
                release_placements(placements[name])
            raise
        self._requests |= {request.name: request for request in requests}
        started = [self._start(request, placements) for request in requests]
        loading = ", ".join(f"{request.name} x{len(request.arguments)}" for request in requests)
        self.notify(f"placed, and loading their models: {loading}")
        self.groups += started
        return started

    def begin_worker(
        self,
        request: WorkerRequest,
        worker_id: int,
        arguments: Mapping[str, Any],
        place: Placement | None = None,
    ) -> StartingWorker:
        """Begin to place and load one more worker of a pool, in the background; see StartingWorker.

        request: what the pool was started with.  arguments: the new worker's own.
        place: that of a lost worker, which this one takes over.
        """
        starting = StartingWorker(request, worker_id, arguments, self.config.deadlines, place)
        self.starting.append(starting)
        return starting

    def adopt_worker(self, workers: RayWorkers, starting: StartingWorker) -> None:
        """Add a worker that is ready to its group."""
        started = starting.poll()
        assert started is not None, f"{starting.name} is not ready"
        self.starting.remove(starting)
        workers.add(started)

    def pop_lost(self) -> list[WorkerLostError]:
        """Deaths in supervised pools that were found since this was last asked."""
        return self.monitor.pop_lost()

    def restart_gang(self, workers: RayWorkers) -> None:
        """End every rank of a gang and start all anew in their places; returns while they load.

        Raises: ResourceError if a place is lost and the cluster has no other within
            deadlines.resources_seconds.
        """
        request = self._requests[workers.name]
        assert request.gang, "other pools replace single workers"
        places = workers.end_processes()
        self._wait_until_placed([request], {request.name: places})
        workers.begin_again(self._start_processes(request, places))

    def has_room_for(self, pool: PoolConfig, copies: int) -> bool:
        """Whether an empty cluster of this size could hold `copies` of a pool at once."""
        total = ray.cluster_resources()
        wanted = {name: copies * pool.count * amount for name, amount in bundle_of(pool).items()}
        return all(total.get(name, 0.0) >= amount for name, amount in wanted.items())

    def stop_workers(self, workers: RayWorkers) -> None:
        """End a pool before the session ends; does nothing for a pool that has already ended."""
        with suppress(ValueError):  # fine-tuning threads may end the same pool at the same time
            self.groups.remove(workers)
        workers.stop()

    def stop_all(self) -> None:
        """End every pool, and every worker that is still starting."""
        self._cancel_starting()
        for workers in list(self.groups):
            self.stop_workers(workers)

    def abandon_all(self) -> None:
        """Kill every process, so that threads that wait for one fail; start nothing afterwards."""
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
        """Start a pool's processes, in their own places or in those of the pool they share."""
        places = placements[request.colocate_with or request.name]
        return RayWorkers(
            request.name,
            self._start_processes(request, places),
            places,
            owns_places=request.colocate_with is None,
            call_seconds=self.config.deadlines.call_seconds,
            monitor=self.monitor,
        )

    def _start_processes(self, request: WorkerRequest, places: Sequence[Placement]) -> list[Any]:
        pairs = enumerate(zip(request.arguments, places, strict=True))
        return [
            start_worker(request, worker_id, arguments, place)
            for worker_id, (arguments, place) in pairs
        ]

    def _wait_until_placed(
        self, requests: Sequence[WorkerRequest], placements: Mapping[str, Sequence[Placement]]
    ) -> None:
        limit = self.config.deadlines.resources_seconds
        deadline = time.monotonic() + limit
        # The placements of a gang share one reference, and ray.wait refuses duplicates.
        every = list({placement.placed: None for pool in placements.values() for placement in pool})
        poll_seconds = PLACED_SECONDS
        while True:
            left = max(0.0, deadline - time.monotonic())
            timeout = min(poll_seconds, left)
            placed, unplaced = ray.wait(every, num_returns=len(every), timeout=timeout)
            if not unplaced:
                return
            wanted, supply = _describe_demand(requests, placements, set(placed)), describe_supply()
            if time.monotonic() >= deadline:
                raise ResourceError(
                    f"the cluster did not place {wanted} within {limit:.0f} s: {supply}. Lower "
                    "pools.*.count, .cpus or .gpus, add nodes, or raise deadlines.resources_seconds"
                )
            self.notify(f"waiting for resources: want {wanted}; {supply}")
            poll_seconds = POLL_SECONDS


def _request_all(requests: Sequence[WorkerRequest]) -> dict[str, list[Placement]]:
    """Request the places of every pool that has places of its own; by the pool's name."""
    return {
        name: request_placements(
            host, beside=[other for other in requests if other.colocate_with == name]
        )
        for name, host in _hosts(requests).items()
    }


def _hosts(requests: Sequence[WorkerRequest]) -> dict[str, WorkerRequest]:
    """The requests that have places of their own, by name; colocated pools have none."""
    return {request.name: request for request in requests if request.colocate_with is None}


def _describe_demand(
    requests: Sequence[WorkerRequest],
    placements: Mapping[str, Sequence[Placement]],
    placed: Collection[ray.ObjectRef[Any]],
) -> str:
    """The pools that are not wholly placed: what each asks for, and how many workers have it."""
    parts = []
    for name, host in _hosts(requests).items():
        beside = [other for other in requests if other.colocate_with == name]
        done = sum(placement.placed in placed for placement in placements[name])
        if done < len(placements[name]):
            pools = " and ".join([name, *(other.name for other in beside)])
            bundle = bundle_of(host.pool, *(other.pool for other in beside))
            each = f"{host.ranks} x {bundle}" if host.ranks > 1 else f"{bundle}"
            part = f"{len(placements[name])} x {each} for {pools}"
            part += " together" if host.gang and len(placements[name]) > 1 else ""
            parts.append(part + (f" ({done} placed)" if done else ""))
    return ", ".join(parts)


def _namespace(config: RunConfig, trains: bool) -> str:
    """The session's namespace in Ray: the run's own, by its folder, or this process's alone."""
    folder = str(Path(config.runs_directory).absolute() / config.name)
    number = zlib.crc32(folder.encode()) if trains else secrets.randbits(32)
    return f"{NAMESPACE}{config.name}-{number:08x}"


def _connect(address: str | None, config: RunConfig, namespace: str) -> None:
    try:
        try:
            _init(address, config, namespace)
        except Exception:
            if address:
                raise
            # Ray gives the processes of a local cluster 30 s, which a busy machine may exceed.
            ray.shutdown()
            _init(address, config, namespace)
    except Exception as error:  # Ray raises bare Exception where a cluster does not start in time
        what = f"join the cluster of RAY_ADDRESS={address}" if address else "start a local cluster"
        causes = [str(cause) for cause in (error, error.__cause__) if cause is not None]
        why = ": ".join(" ".join(cause.split()) for cause in causes)
        raise ResourceError(f"Ray could not {what}: {why}") from error


def _init(address: str | None, config: RunConfig, namespace: str) -> None:
    local = {} if address else local_arguments(config.cluster)
    with listening_on("network" if address else config.cluster.listen_on):
        ray.init(
            address="auto" if address else "local",  # "auto" makes Ray read RAY_ADDRESS
            namespace=namespace,
            job_config=JobConfig(metadata={"run": config.name}),
            log_to_driver=False,
            logging_level="ERROR",
            **local,
        )


def _shut_down() -> None:
    with _signal_handlers_kept():
        ray.shutdown()


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore our SIGTERM handler after a block in which Ray replaces it.

    ray.init installs a handler of its own, and ray.shutdown removes it below Python's notice:
    signal.getsignal still returns ours, yet the system's handler is gone until it is set again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows signal.signal in the main thread alone
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
