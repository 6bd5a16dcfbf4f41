"""A Ray cluster for the length of a `with` block: joined or started, and left as it was found."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distill_system.cluster.roster import Roster
from distill_system.cluster.workers import RayWorkers
from distill_system.config import RunConfig
from distill_system.config.pools import PoolConfig
from distill_system.errors import DistillError, ResourceError

POLL_SECONDS = 5.0
CONNECT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRequest:
    """A pool of workers to start: one class, one set of keyword arguments per worker.

    worker_class: has a method `ready` that every worker is asked for first; a DistillError of its
    constructor is raised there.
    gang: place all workers together or none (a group whose ranks must meet), instead of one by one.
    """

    name: str
    worker_class: type
    arguments: list[dict[str, Any]]
    pool: PoolConfig
    environment: Mapping[str, str] = field(default_factory=dict)
    gang: bool = False


class ClusterSession:
    """Starts workers on the cluster of RAY_ADDRESS, or on a local one that ends with the block."""

    def __init__(self, config: RunConfig, *, say: Callable[[str], None]) -> None:
        self.config = config
        self.say = say
        self.roster = Roster()
        self.groups: list[RayWorkers] = []

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
        bundle = _bundle(request.pool)
        count = len(request.arguments)
        if request.gang:
            groups = [placement_group([bundle] * count, strategy="PACK")]
        else:
            groups = [placement_group([bundle]) for _ in range(count)]
        self._wait_until_placed(request, groups)
        handles = [
            self._start(request, index, groups[0 if request.gang else index])
            for index in range(count)
        ]
        workers = RayWorkers(
            request.name,
            handles,
            groups,
            call_seconds=self.config.deadlines.call_seconds,
            roster=self.roster,
        )
        self.groups.append(workers)
        return workers

    def has_room_for(self, pool: PoolConfig, copies: int) -> bool:
        """Whether so many copies of a pool fit the whole cluster at once, were it empty."""
        has = ray.cluster_resources()
        wanted = {name: copies * pool.count * amount for name, amount in _bundle(pool).items()}
        return all(has.get(name, 0.0) >= amount for name, amount in wanted.items())

    def stop_workers(self, workers: RayWorkers) -> None:
        """End a pool before the session ends; one that has ended already stays so."""
        with suppress(ValueError):  # another thread may be ending it too
            self.groups.remove(workers)
        workers.stop()

    def stop_all(self) -> None:
        """End every pool."""
        for workers in list(self.groups):
            self.stop_workers(workers)

    def abandon_all(self) -> None:
        """End every process, and with it every wait for one; the session can start no more."""
        for workers in list(self.groups):
            workers.kill()

    def _start(self, request: WorkerRequest, index: int, group: PlacementGroup) -> Any:
        remote_class = ray.remote(_failing_when_ready(request.worker_class))
        return remote_class.options(
            name=f"{request.name}-{index}-{group.id.hex()[:6]}",
            num_cpus=request.pool.cpus,
            num_gpus=request.pool.gpus,
            resources=dict(request.pool.custom_resources),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group,
                placement_group_bundle_index=index if request.gang else 0,
            ),
            runtime_env={"env_vars": dict(request.environment)},
        ).remote(**request.arguments[index])

    def _wait_until_placed(self, request: WorkerRequest, groups: list[PlacementGroup]) -> None:
        deadline = time.monotonic() + self.config.deadlines.resources_seconds
        unplaced = list(groups)
        while unplaced:
            unplaced = [group for group in unplaced if not group.wait(timeout_seconds=1.0)]
            if not unplaced:
                return
            wanted = f"{len(request.arguments)} x {_bundle(request.pool)} for {request.name}"
            state = f"free {_numbers(ray.available_resources())}"
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"the cluster did not place {wanted} within "
                    f"{self.config.deadlines.resources_seconds:.0f} s: {state} of "
                    f"{_numbers(ray.cluster_resources())}. Lower pools.*.count, .cpus or .gpus, "
                    "or add nodes"
                )
            self.say(f"waiting for resources: want {wanted}; {state}")
            time.sleep(max(0.0, min(POLL_SECONDS, deadline - time.monotonic())))


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


def _failing_when_ready(worker_class: type) -> type:
    """The class with a constructor that keeps a DistillError until `ready` is asked for.

    Ray reports a worker whose constructor raises as dead, and the error's type is lost.
    """

    class Worker(worker_class):  # type: ignore[misc]  # a class known at run time
        _start_error: DistillError | None = None

        def __init__(self, **arguments: Any) -> None:
            try:
                super().__init__(**arguments)
            except DistillError as error:
                self._start_error = error

        def ready(self) -> Any:
            if self._start_error is not None:
                raise self._start_error
            return super().ready()

    Worker.__name__ = worker_class.__name__
    Worker.__qualname__ = worker_class.__qualname__
    return Worker


def _bundle(pool: PoolConfig) -> dict[str, float]:
    bundle = {"CPU": pool.cpus, "GPU": pool.gpus, **pool.custom_resources}
    return {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.001}


def _numbers(resources: Mapping[str, float]) -> dict[str, float]:
    """What a person asks for: CPUs, GPUs and custom resources, without node names and memory."""
    hidden = ("node:", "memory", "object_store_memory", "CPU_group", "GPU_group", "bundle_group")
    return {name: amount for name, amount in resources.items() if not name.startswith(hidden)}
