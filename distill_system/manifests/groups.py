"""A run's pools -> groups of equal pods: which workers stand in a pod, and how many pods there are.

Every pod offers its group's own Ray resource once for each worker that it is meant for, and every
worker asks for it (`with_places`). So no worker lands in another group's pod, whose memory was not
planned for it, and Ray's autoscaler adds pods of the group whose pool grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distill_system.config import RunConfig
from distill_system.config.pools import PoolConfig
from distill_system.errors import ConfigError

MOST_RANKS_IN_A_POD = 8
"""Ranks that share a model stand in one pod as far as this goes: the GPUs of one node."""

SHARED_GROUP = "shared_gpu"
"""The group of pools that fit one GPU together."""

DRIVER_PLACE = "driver_place"
"""What the head alone offers, so that the driver runs there, where its memory is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodGroup:
    """Equal pods for one pool, or for pools whose workers stand side by side.

    pools: names of the pools whose workers stand in it.  worker_counts: workers of each of them in
    one pod, or ranks of workers that several make up.  fewest, count, most: pods at the least, at
    the start, at the most.
    cpus, gpus: of one pod, whole ones.  custom_resources: Ray resources that one pod offers, the
    group's own among them.
    """

    name: str
    pools: tuple[str, ...]
    worker_counts: Mapping[str, int]
    fewest: int
    count: int
    most: int
    cpus: int
    gpus: int
    custom_resources: Mapping[str, int]

    @property
    def place(self) -> str:
        """The Ray resource that keeps the group's workers in its pods."""
        return _place_of(self.name)

    @property
    def is_elastic(self) -> bool:
        """Whether the number of pods may change while the run goes on."""
        return self.fewest < self.most


def pod_groups(config: RunConfig, *, workers_per_pod: Mapping[str, int]) -> list[PodGroup]:
    """The groups that hold all pools of a run.

    workers_per_pod: workers of a pool in one of its pods, where it is not what `default_workers`
        says.
    Raises: ConfigError if workers_per_pod names no pool that stands by itself, or a pool asks for a
        custom resource of a group's name.
    """
    pools = config.pools.by_name
    standing = {name: pool for name, pool in pools.items() if pool.colocate_with is None}
    if unknown := sorted(workers_per_pod.keys() - standing.keys()):
        raise ConfigError(
            f"--workers-per-pod {unknown[0]}: expected one of {', '.join(standing)}; a pool with "
            "colocate_with stands in the pods of the other"
        )
    taken = {DRIVER_PLACE, *(_place_of(name) for name in (*pools, SHARED_GROUP))}
    for name, pool in pools.items():
        if clash := sorted(taken & pool.custom_resources.keys()):
            raise ConfigError(
                f"pools.{name}.custom_resources: {clash[0]} is what the pods of one kind offer "
                "to keep their workers there: give the resource another name"
            )
    if _fit_one_gpu(pools) and not workers_per_pod:
        return [_one_group(pools)]
    return [
        _group(config, name, pool, workers_per_pod.get(name) or default_workers(config, name))
        for name, pool in standing.items()
    ]


def default_workers(config: RunConfig, name: str) -> int:
    """Workers of a pool in one of its pods: one; of shares of a GPU as many as fit a GPU; of a
    learner or scorer the ranks that share one copy of the model, up to MOST_RANKS_IN_A_POD."""
    pool = config.pools.by_name[name]
    gpus = _units(config, name)[1]
    if 0.0 < gpus < 1.0:
        return min(pool.most, int(1.0 / gpus + 1e-6))
    share = config.ranks_per_worker(name)
    if name == "learner":
        share = config.learner.shard_size(pool.count)
    return max(n for n in range(1, MOST_RANKS_IN_A_POD + 1) if share % n == 0)


def with_places(config: RunConfig, groups: list[PodGroup]) -> RunConfig:
    """The configuration in which every worker asks for one place of its own group."""
    updates = {
        name: pool.model_copy(
            update={"custom_resources": {**pool.custom_resources, group.place: 1.0}}
        )
        for group in groups
        for name, pool in config.pools.by_name.items()
        # The place of a worker beside another is that of the other.
        if name in group.pools and pool.colocate_with is None
    }
    return config.model_copy(update={"pools": config.pools.model_copy(update=updates)})


def _place_of(group: str) -> str:
    return f"{group}_place"


def _fit_one_gpu(pools: Mapping[str, PoolConfig]) -> bool:
    """Whether these are pools of fixed size that ask for shares of a GPU, one GPU together."""
    shares = [pool.gpus * pool.count for pool in pools.values()]
    fixed = not any(pool.is_elastic or pool.colocate_with for pool in pools.values())
    return fixed and all(0.0 < p.gpus < 1.0 for p in pools.values()) and sum(shares) <= 1.0 + 1e-6


def _one_group(pools: Mapping[str, PoolConfig]) -> PodGroup:
    """One pod with one GPU for all pools."""
    counts = {name: pool.count for name, pool in pools.items()}
    offered = _custom_resources(pools, counts)
    return PodGroup(
        name=SHARED_GROUP,
        pools=tuple(pools),
        worker_counts=counts,
        fewest=1,
        count=1,
        most=1,
        cpus=_whole(sum(pool.cpus * pool.count for pool in pools.values())),
        gpus=1,
        custom_resources={**offered, _place_of(SHARED_GROUP): sum(counts.values())},
    )


def _group(config: RunConfig, name: str, pool: PoolConfig, workers: int) -> PodGroup:
    """The pods of one pool and of the pool beside it."""
    names = (name, *_beside(config, name))
    counts, ranks = dict.fromkeys(names, workers), config.ranks_per_worker(name)
    cpus, gpus = _units(config, name)
    together = {each: config.pools.by_name[each] for each in names}
    return PodGroup(
        name=name,
        pools=names,
        worker_counts=counts,
        fewest=math.ceil(pool.fewest * ranks / workers),
        count=math.ceil(pool.count * ranks / workers),
        most=math.ceil(pool.most * ranks / workers),
        cpus=_whole(workers * cpus),
        gpus=math.ceil(workers * gpus - 1e-6),
        custom_resources={**_custom_resources(together, counts), _place_of(name): workers},
    )


def _beside(config: RunConfig, name: str) -> Iterator[str]:
    """The pools whose workers stand beside those of this one."""
    return (other for other, pool in config.pools.by_name.items() if pool.colocate_with == name)


def _units(config: RunConfig, name: str) -> tuple[float, float]:
    """CPUs and GPUs of one worker of a pool and of the one beside it."""
    pools = [config.pools.by_name[each] for each in (name, *_beside(config, name))]
    return sum(pool.cpus for pool in pools), sum(pool.gpus for pool in pools)


def _custom_resources(pools: Mapping[str, PoolConfig], counts: Mapping[str, int]) -> dict[str, int]:
    """What the workers of one pod ask for beside CPUs and GPUs, in whole numbers."""
    total: dict[str, float] = {}
    for name, pool in pools.items():
        for resource, amount in pool.custom_resources.items():
            total[resource] = total.get(resource, 0.0) + counts[name] * amount
    return {resource: _whole(amount) for resource, amount in total.items() if amount > 0}


def _whole(amount: float) -> int:
    """The next whole number, at least 1."""
    return max(1, math.ceil(amount - 1e-6))
