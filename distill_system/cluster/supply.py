"""What this machine would offer to a local cluster, and whether pools fit it; starts nothing."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
from ray._private.utils import get_num_cpus

from distill_system.cluster.placement import bundle_of
from distill_system.config import RunConfig
from distill_system.errors import ResourceError


def joins_a_cluster() -> bool:
    """Whether runs join the cluster of RAY_ADDRESS, whose size is known only to itself."""
    return bool(os.environ.get("RAY_ADDRESS"))


def machine_supply() -> dict[str, float]:
    """CPUs and GPUs that Ray gives a cluster which it starts on this machine."""
    gpus = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    return {"CPU": float(get_num_cpus()), "GPU": float(gpus)}


def pools_demand(config: RunConfig, names: Collection[str] | None = None) -> dict[str, float]:
    """Everything that these pools reserve together, by resource; None: all of a distillation."""
    total: dict[str, float] = {}
    for name, pool in config.pools.by_name.items():
        if names is None or name in names:
            for resource, amount in bundle_of(pool).items():
                share = pool.count * config.ranks_per_worker(name) * amount
                total[resource] = total.get(resource, 0.0) + share
    return total


def require_room(config: RunConfig, names: Collection[str] | None = None) -> None:
    """Refuse pools that a local cluster of this machine could never place.

    A cluster of RAY_ADDRESS may grow: it is asked, and waited for.
    Raises: ResourceError.
    """
    demand = pools_demand(config, names)
    shortages = {} if joins_a_cluster() else find_shortages(demand, machine_supply())
    if shortages:
        raise ResourceError(describe_shortage(demand, shortages))


def find_shortages(demand: Mapping[str, float], supply: Mapping[str, float]) -> dict[str, float]:
    """The resources of which more is asked for than there is, each with what there is."""
    return {
        name: supply.get(name, 0.0)
        for name, amount in demand.items()
        if amount > supply.get(name, 0.0) + 1e-6
    }


def describe_shortage(demand: Mapping[str, float], shortages: Mapping[str, float]) -> str:
    """One line for a person: what is asked for, what there is, and the keys to lower."""
    parts = [f"{demand[name]:g} {name} of {there:g}" for name, there in shortages.items()]
    return (
        f"the pools ask for {', '.join(parts)} that a local cluster on this machine has: lower "
        "pools.*.cpus (a share of a CPU is allowed, as 0.25), pools.*.gpus or pools.*.count, or "
        "join a larger cluster by RAY_ADDRESS"
    )
