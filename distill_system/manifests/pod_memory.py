"""A plan's workers -> the CPU memory of a pod and of the object store in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from distill_system.config import RunConfig
from distill_system.errors import ConfigError, ResourceError
from distill_system.manifests.groups import PodGroup
from distill_system.planning import Plan, WorkerPlan
from distill_system.planning.memory import GIB

MARGIN = 1.5
"""What a worker's allocator may hold above what is alive: up to 46 % more was measured in float32
steps on a CPU (docs/scaling.md)."""
GPU_PROCESS_BYTES = 4.0 * GIB
"""CPU memory of a worker with a GPU beside its model: Python, torch, CUDA's and vLLM's own. An
assumption: no such worker has been measured in a pod."""
RAY_BYTES = 1.0 * GIB
"""Ray's own processes in a pod: raylet, agents."""
LEAST_STORE_BYTES = 0.5 * GIB
STORE_SHARE = 0.3
"""Ray's own share of a node's memory for its object store."""
_STATE = ("weights", "weights set aside", "optimizer state")


@dataclass(frozen=True, slots=True)
class PodMemory:
    """Of one pod: all of it, and the part that the object store in /dev/shm may take."""

    num_bytes: int
    store_bytes: int


def plan_pod_memory(
    config: RunConfig,
    groups: list[PodGroup],
    plan: Plan | None,
    *,
    given_gib: Mapping[str, float],
) -> dict[str, PodMemory]:
    """The memory of each group's pods, by group.

    plan: None if the models cannot be read here; then every group's memory must be given.
    given_gib: memory of a group's pod, where it is not to be what the plan predicts.
    Raises: ConfigError if memory is missing or given for no group; ResourceError if a worker does
        not fit its GPU.
    """
    names = [group.name for group in groups]
    if unknown := sorted(given_gib.keys() - set(names)):
        raise ConfigError(f"--memory {unknown[0]}: expected one of {', '.join(names)}")
    if plan is None and (missing := [name for name in names if name not in given_gib]):
        raise ConfigError(f"give the memory of a pod by --memory {missing[0]}=GIB")
    if plan is not None:
        _require_room_on_gpus(plan)
    return {group.name: _pod(config, group, plan, given_gib.get(group.name)) for group in groups}


def _require_room_on_gpus(plan: Plan) -> None:
    for worker in plan.workers:
        if worker.fits is False:
            raise ResourceError(
                f"{worker.pool} does not fit its GPU: expected at most "
                f"{(worker.room_bytes or 0.0) / GIB:.3g} GiB (--device-gib), got "
                f"{worker.num_bytes / GIB:.3g}; `distill-system plan` says which keys lower it"
            )


def _pod(
    config: RunConfig, group: PodGroup, plan: Plan | None, given_gib: float | None
) -> PodMemory:
    if plan is None:
        assert given_gib is not None, "the caller has looked"
        whole = given_gib * GIB
        return PodMemory(int(whole), int(max(LEAST_STORE_BYTES, STORE_SHARE * whole)))
    store = _store_bytes(config, group, plan)
    if given_gib is not None:
        return PodMemory(int(given_gib * GIB), store)
    workers = sum(
        count * max(_host_bytes(worker, plan) for worker in _plans_of(pool, plan))
        for pool, count in group.worker_counts.items()
    )
    return PodMemory(math.ceil((RAY_BYTES + store + workers) / GIB) * GIB, store)


def _plans_of(pool: str, plan: Plan) -> list[WorkerPlan]:
    """What a worker of the pool holds, in the distillation and in what comes before it."""
    found = [worker for worker in plan.workers if worker.pool == pool]
    tunings = [worker for worker in plan.before if worker.trains]
    return [*found, *tunings] if pool == "learner" else found


def _host_bytes(worker: WorkerPlan, plan: Plan) -> float:
    """CPU memory of one worker, with the copies that a checkpoint and a publish make."""
    memory = worker.memory
    held = memory.host_bytes
    held += GPU_PROCESS_BYTES + memory.parts.get("weights", 0.0) if worker.gpus else 0.0
    held += 0.0 if worker.gpus else worker.num_bytes
    if worker.trains:
        held += sum(memory.parts.get(part, 0.0) for part in _STATE) + memory.host_bytes
        held += plan.publish_bytes
    return MARGIN * held


def _store_bytes(config: RunConfig, group: PodGroup, plan: Plan) -> int:
    """Room for what the teacher says of the steps in flight, where it is made and where it is read.

    In lockstep the teacher is one step ahead; else max_staleness + 1 batches are in flight.
    """
    if not {"teacher_scoring", "learner"} & set(group.pools):
        return int(LEAST_STORE_BYTES)
    steps = config.distill.staleness.max_staleness + 2
    targets = float(plan.wire_bytes_per_token) * plan.scored_tokens * steps
    return int(max(LEAST_STORE_BYTES, targets / group.fewest))
