"""Prompts in, trajectories out: vLLM engines behind rollout workers, and the pool of workers."""

from distill_system.rollout.environment import engine_environment
from distill_system.rollout.pool import PendingRollouts, RolloutPool
from distill_system.rollout.sampling import Sampling
from distill_system.rollout.worker import RolloutWorker

__all__ = ["PendingRollouts", "RolloutPool", "RolloutWorker", "Sampling", "engine_environment"]
