"""Prompts in, trajectories out: vLLM engines behind rollout workers, and the pool of workers."""

from distill_system.rollout.continuous import NO_VERSION, ContinuousRollouts
from distill_system.rollout.environment import engine_environment
from distill_system.rollout.pool import PendingRollouts, RolloutPool
from distill_system.rollout.sampling import Sampling
from distill_system.rollout.worker import Order, RolloutWorker, Slice

__all__ = [
    "NO_VERSION",
    "ContinuousRollouts",
    "Order",
    "PendingRollouts",
    "RolloutPool",
    "RolloutWorker",
    "Sampling",
    "Slice",
    "engine_environment",
]
