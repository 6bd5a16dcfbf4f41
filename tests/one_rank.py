"""A learner of one rank on the CPU, for tests that say what matters of it."""

from __future__ import annotations

from typing import Any

from distill_system.config.model import LearnerConfig, OptimizerConfig
from distill_system.learner import Learner, ModelSource


def one_rank(source: ModelSource, **settings: Any) -> Learner:
    """settings: of Learner, in place of supervised fine-tuning for ten steps."""
    usual = {
        "rank": 0,
        "world_size": 1,
        "objective": None,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        "config": LearnerConfig(),
        "total_steps": 10,
        "max_response_tokens": 16,
        "seed": 0,
        "uses_gpu": False,
        "timeout_seconds": 60.0,
    }
    return Learner(source=source, **{**usual, **settings})
