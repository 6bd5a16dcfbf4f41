"""What is Ray's own: a session, placed workers, deadlines on every wait."""

from distill_system.cluster.session import ClusterSession, WorkerRequest
from distill_system.cluster.weight_sync import EveryWorker
from distill_system.cluster.workers import RayWorkers

__all__ = ["ClusterSession", "EveryWorker", "RayWorkers", "WorkerRequest"]
