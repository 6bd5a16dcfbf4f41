"""What is Ray's own: a session, placed workers, deadlines on every wait."""

from distill_system.cluster.placement import ElasticPool, WorkerRequest
from distill_system.cluster.session import ClusterSession
from distill_system.cluster.starting import StartingWorker
from distill_system.cluster.weight_sync import EveryWorker
from distill_system.cluster.workers import RayWorkers, named_together

__all__ = [
    "ClusterSession",
    "ElasticPool",
    "EveryWorker",
    "RayWorkers",
    "StartingWorker",
    "WorkerRequest",
    "named_together",
]
