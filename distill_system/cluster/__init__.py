"""Everything that touches Ray: the session, placed workers, a deadline on every wait."""

from distill_system.cluster.placement import ElasticPool, WorkerRequest
from distill_system.cluster.reach import require_joinable
from distill_system.cluster.session import ClusterSession
from distill_system.cluster.starting import StartingWorker
from distill_system.cluster.supervised import SupervisedWorkers
from distill_system.cluster.supply import (
    describe_shortage,
    find_shortages,
    joins_a_cluster,
    machine_supply,
    pools_demand,
    require_room,
)
from distill_system.cluster.weight_sync import EveryWorker
from distill_system.cluster.workers import RayWorkers, all_named_handles

__all__ = [
    "ClusterSession",
    "ElasticPool",
    "EveryWorker",
    "RayWorkers",
    "StartingWorker",
    "SupervisedWorkers",
    "WorkerRequest",
    "all_named_handles",
    "describe_shortage",
    "find_shortages",
    "joins_a_cluster",
    "machine_supply",
    "pools_demand",
    "require_joinable",
    "require_room",
]
