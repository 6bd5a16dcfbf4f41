"""Where workers run: the resources each asks for, its placement group, the process in it.

Ray cannot grow a placement group, so every worker has a group of its own and pools can change.
Two cases share a group: a gang (ranks that are placed all or none), and colocated workers. Ray's
autoscaler counts a group that is requested and not yet placed as demand.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distill_system.config.pools import PoolConfig
from distill_system.errors import DistillError
from distill_system.logs import logged_start
from distill_system.network import use_node_address
from distill_system.workers import ElasticWorkers

WORKER_VARIABLE = "DISTILL_SYSTEM_WORKER"
"""Holds the worker's name, pool-id, in its process: what a person on its node knows it by."""
NAMESPACE = "distill-"
"""Beginning of a session's namespace in Ray; the run's name and a number of its folder follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRequest:
    """A pool of workers to start: one class, one set of keyword arguments per worker.

    worker_class: has a method `ready`, which is called first on every worker; a DistillError that
    the constructor raised is raised by that call.
    gang: place all workers together or none, because their ranks must connect to one another.
    ranks: processes that make up one worker, each with the pool's resources; see cluster.peers.
    colocate_with: name of another request in the same call; worker i of this pool shares the bundle
    of worker i of that pool, which then holds the resources of both.
    """

    name: str
    worker_class: type
    arguments: list[dict[str, Any]]
    pool: PoolConfig
    environment: Mapping[str, str] = field(default_factory=dict)
    gang: bool = False
    ranks: int = 1
    colocate_with: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticPool:
    """A pool whose size may change.  request: what the pool was started with."""

    workers: ElasticWorkers
    request: WorkerRequest

    @property
    def config(self) -> PoolConfig:
        """The pool's bounds, and the resources of one worker."""
        return self.request.pool

    def arguments(self, worker_id: int) -> dict[str, Any]:
        """Arguments for one more worker: those of worker 0, with its own `name` if it takes one."""
        first = self.request.arguments[0]
        has_name = "name" in first
        return {**first, "name": f"{self.request.name}-{worker_id}"} if has_name else dict(first)


@dataclass(frozen=True, slots=True)
class Placement:
    """One worker's place: a bundle of a placement group, the first of several ranks'.

    placed: Ray's reference that is ready once the cluster has reserved the group.
    """

    group: PlacementGroup
    bundle_index: int
    placed: ray.ObjectRef[Any]

    @property
    def is_placed(self) -> bool:
        """Whether the cluster has reserved the place by now; does not wait."""
        return bool(ray.wait([self.placed], timeout=0)[0])

    def is_same(self, other: Placement) -> bool:
        """Whether both are one bundle of one group, asked for now or before."""
        return (self.group, self.bundle_index) == (other.group, other.bundle_index)

    def again(self) -> Placement:
        """The same place for another process. Where its node is lost, Ray looks for another node,
        and `placed` is ready once it has found one."""
        return replace(self, placed=self.group.ready())


def request_placements(
    request: WorkerRequest, *, beside: Sequence[WorkerRequest] = (), first_id: int = 0
) -> list[Placement]:
    """Request a place for each worker of a pool; returns at once.

    beside: the requests whose workers are colocated with these.  first_id: of the first worker.
    """
    bundle = bundle_of(request.pool, *(other.pool for other in beside))
    count = len(request.arguments)
    if request.gang:
        group = placement_group([bundle] * count, strategy="PACK", name=ray_name(request.name))
        placed = group.ready()
        return [Placement(group, index, placed) for index in range(count)]
    names = [ray_name(f"{request.name}-{first_id + index}") for index in range(count)]
    # Ranks of one worker on one node where that goes: what they gather travels among them.
    groups = [placement_group([bundle] * request.ranks, "PACK", name=name) for name in names]
    return [Placement(group, 0, group.ready()) for group in groups]


def ray_name(worker: str) -> str:
    """What Ray's dashboard calls a worker or its place: after the run, the pool and the index.

    The end makes it unique: a session may start a pool of one name twice.
    """
    run = ray.get_runtime_context().namespace.removeprefix(NAMESPACE).rpartition("-")[0]
    return f"{run} {worker} {secrets.token_hex(3)}"


def release_placements(placements: Sequence[Placement]) -> None:
    """Return places to the cluster; requests that are still pending are withdrawn."""
    for group in dict.fromkeys(placement.group for placement in placements):
        remove_placement_group(group)


def start_process(
    request: WorkerRequest, name: str, arguments: Mapping[str, Any], placement: Placement
) -> Any:
    """Start a process of a worker in its place, called `name`; returns its handle at once."""
    remote_class = ray.remote(_failing_when_ready(request.worker_class))
    return remote_class.options(
        name=ray_name(name),
        num_cpus=request.pool.cpus,
        num_gpus=request.pool.gpus,
        resources=dict(request.pool.custom_resources),
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=placement.group, placement_group_bundle_index=placement.bundle_index
        ),
        runtime_env={
            "env_vars": {
                **_hidden_gpus(request.pool),
                **request.environment,
                WORKER_VARIABLE: name,
            }
        },
    ).remote(**arguments)


def _hidden_gpus(pool: PoolConfig) -> dict[str, str]:
    """Ray shows a node's GPUs to those who asked for none of them."""
    return {} if pool.gpus else {"CUDA_VISIBLE_DEVICES": ""}


def bundle_of(*pools: PoolConfig) -> dict[str, float]:
    """Resources of one worker of each of these pools together, without zero amounts."""
    bundle: dict[str, float] = {}
    for pool in pools:
        for name, amount in {"CPU": pool.cpus, "GPU": pool.gpus, **pool.custom_resources}.items():
            if amount > 0:
                bundle[name] = bundle.get(name, 0.0) + amount
    return bundle or {"CPU": 0.001}  # Ray refuses an empty bundle


NODES_SHOWN = 6


def describe_supply() -> str:
    """What each node has free, those with most first, for a message.

    By node, since a worker needs one that holds all of it: a sum over nodes may be no place at all.
    """
    free = available_resources_per_node()
    alive = [node for node in ray.nodes() if node["Alive"]]
    rows = [
        (_visible(free.get(node["NodeID"], {})), _visible(node["Resources"]), node["NodeName"])
        for node in alive
    ]
    rows.sort(key=lambda row: (sum(row[0].values()), sum(row[1].values())), reverse=True)
    shown = [
        f"free {_whole(have, whole)} of {whole} on {name}"
        for have, whole, name in rows[:NODES_SHOWN]
    ]
    more = len(rows) - len(shown)
    return "; ".join([*shown, f"and {more} nodes with less" if more else ""]).rstrip("; ")


def _whole(have: Mapping[str, float], of: Mapping[str, float]) -> dict[str, float]:
    """What is free, with 0 for what is all taken: Ray leaves that out."""
    return {name: have.get(name, 0.0) for name in of}


def _visible(resources: Mapping[str, float]) -> dict[str, float]:
    """The resources that a configuration can ask for: CPUs, GPUs and custom ones.

    Ray's list also holds memory, one entry per node, and one per placement group (CPU_group_...).
    """
    hidden = ("node:", "memory", "object_store_memory", "bundle_group")
    return {
        name: round(amount, 4)
        for name, amount in resources.items()
        if not name.startswith(hidden) and "_group_" not in name
    }


def _describe_process() -> str:
    """This worker's process, and the files in which Ray keeps what it writes to its streams."""
    context, node = ray.get_runtime_context(), ray.util.get_node_ip_address()
    name = f"worker-{context.get_worker_id()}-*"  # then a job, which may be none, and the process
    folder = ray._private.worker.global_worker.node.get_logs_dir_path()
    return f"process {os.getpid()} on {node}, whose streams are {folder}/{name}"


def _failing_when_ready(worker_class: type) -> type:
    """The class with a constructor that holds back a DistillError until `ready` is called.

    The constructor first says which address the worker's node has.

    When a constructor raises, Ray only reports that the worker died: the error's type is lost.
    """

    class Worker(worker_class):  # type: ignore[misc]  # a class known at run time
        _start_error: DistillError | None = None

        def __init__(self, **arguments: Any) -> None:
            try:
                use_node_address(ray.util.get_node_ip_address())
                with logged_start(os.environ[WORKER_VARIABLE], _describe_process()):
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
