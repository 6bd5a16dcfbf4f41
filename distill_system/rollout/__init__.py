"""Prompts in, trajectories out: vLLM engines behind rollout workers, and the pool of workers."""

from distill_system.rollout.environment import engine_environment
from distill_system.rollout.pool import LeaveOut, PendingRollouts, RolloutPool, fatal_prompt
from distill_system.rollout.sampling import Sampling
from distill_system.rollout.worker import DecodeSlice, GenerationRequest, RolloutWorker

__all__ = [
    "DecodeSlice",
    "GenerationRequest",
    "LeaveOut",
    "PendingRollouts",
    "RolloutPool",
    "RolloutWorker",
    "Sampling",
    "engine_environment",
    "fatal_prompt",
]
