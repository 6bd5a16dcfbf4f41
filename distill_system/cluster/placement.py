"""Where workers are put: what each asks for, one placement group each, and the process in it.

Ray cannot grow a placement group, so every worker has its own; a gang shares one, as do workers
that are to stand side by side. A group that is asked for and not yet placed is what Ray's
autoscaler sees as demand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distill_system.config.pools import PoolConfig
from distill_system.errors import DistillError
from distill_system.workers import ElasticWorkers


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRequest:
    """A pool of workers to start: one class, one set of keyword arguments per worker.

    worker_class: has a method `ready` that every worker is asked for first; a DistillError of its
    constructor is raised there.
    gang: place all workers together or none (a group whose ranks must meet), instead of one by one.
    colocate_with: name of the request, started in the same call, whose workers these stand beside:
    the two workers of one id share one bundle, which holds what both ask for.
    """

    name: str
    worker_class: type
    arguments: list[dict[str, Any]]
    pool: PoolConfig
    environment: Mapping[str, str] = field(default_factory=dict)
    gang: bool = False
    colocate_with: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticPool:
    """A pool that may change.  request: as the pool was started."""

    workers: ElasticWorkers
    request: WorkerRequest

    @property
    def config(self) -> PoolConfig:
        """Its bounds, and what a worker asks of the cluster."""
        return self.request.pool

    def arguments(self, worker_id: int) -> dict[str, Any]:
        """Of one more worker: those of the others, with a name of its own where they have one."""
        first = self.request.arguments[0]
        has_name = "name" in first
        return {**first, "name": f"{self.request.name}-{worker_id}"} if has_name else dict(first)


@dataclass(frozen=True, slots=True)
class Placement:
    """One worker's place: a bundle of a placement group, and Ray's promise that it is placed."""

    group: PlacementGroup
    bundle_index: int
    placed: ray.ObjectRef[Any]

    @property
    def is_placed(self) -> bool:
        """Whether the cluster has given the place; asks and does not wait."""
        return bool(ray.wait([self.placed], timeout=0)[0])


def request_placements(
    request: WorkerRequest, *, beside: Sequence[WorkerRequest] = ()
) -> list[Placement]:
    """Ask the cluster for a place for each worker of a pool; returns at once.

    beside: the requests whose workers share the places.
    """
    bundle = bundle_of(request.pool, *(other.pool for other in beside))
    count = len(request.arguments)
    if request.gang:
        group = placement_group([bundle] * count, strategy="PACK")
        placed = group.ready()
        return [Placement(group, index, placed) for index in range(count)]
    groups = [placement_group([bundle]) for _ in range(count)]
    return [Placement(group, 0, group.ready()) for group in groups]


def release_placements(placements: Sequence[Placement]) -> None:
    """Return places to the cluster; those not placed yet are asked for no more."""
    for group in dict.fromkeys(placement.group for placement in placements):
        remove_placement_group(group)


def start_process(
    request: WorkerRequest, worker_id: int, arguments: Mapping[str, Any], placement: Placement
) -> Any:
    """Begin a worker's process in its place; returns its handle at once."""
    remote_class = ray.remote(_failing_when_ready(request.worker_class))
    return remote_class.options(
        name=f"{request.name}-{worker_id}-{placement.group.id.hex()[:6]}",
        num_cpus=request.pool.cpus,
        num_gpus=request.pool.gpus,
        resources=dict(request.pool.custom_resources),
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=placement.group, placement_group_bundle_index=placement.bundle_index
        ),
        runtime_env={"env_vars": dict(request.environment)},
    ).remote(**arguments)


def bundle_of(*pools: PoolConfig) -> dict[str, float]:
    """What one worker of each of these pools asks for, together; no part of it is zero."""
    bundle: dict[str, float] = {}
    for pool in pools:
        for name, amount in {"CPU": pool.cpus, "GPU": pool.gpus, **pool.custom_resources}.items():
            if amount > 0:
                bundle[name] = bundle.get(name, 0.0) + amount
    return bundle or {"CPU": 0.001}


def describe_supply() -> str:
    """What the cluster has free, and what it has, for a message."""
    free, whole = _numbers(ray.available_resources()), _numbers(ray.cluster_resources())
    return f"free {free} of {whole}"


def _numbers(resources: Mapping[str, float]) -> dict[str, float]:
    """What a person asks for: CPUs, GPUs and custom resources, without node names and memory."""
    hidden = ("node:", "memory", "object_store_memory", "bundle_group")
    return {
        name: round(amount, 4)
        for name, amount in resources.items()
        if not name.startswith(hidden) and "_group_" not in name
    }


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
