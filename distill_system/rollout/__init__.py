"""Prompts in, trajectories out: vLLM engines behind rollout workers, and the pool of workers."""

from distill_system.rollout.environment import engine_environment
from distill_system.rollout.pool import PendingRollouts, RolloutPool
from distill_system.rollout.sampling import Sampling
from distill_system.rollout.worker import DecodeSlice, GenerationRequest, RolloutWorker

__all__ = [
    "DecodeSlice",
    "GenerationRequest",
    "PendingRollouts",
    "RolloutPool",
    "RolloutWorker",
    "Sampling",
    "engine_environment",
]
