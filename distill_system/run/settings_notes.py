"""What a run makes of settings that it does not take as they are written; told as it starts."""

from __future__ import annotations

from collections.abc import Iterator

from distill_system.config import RunConfig
from distill_system.config.model import OptimizerConfig
from distill_system.config.pool_readers import MEASURES


def settings_notes(config: RunConfig) -> list[str]:
    """A line for each setting that is fitted to the run."""
    return [*_fitted_warmups(config), *_idle_pools(config)]


def _idle_pools(config: RunConfig) -> Iterator[str]:
    """What is not started, or not for the steps."""
    for name, readers in config.pool_readers.items():
        if name == "teacher_rollout" and config.teacher_writes_first:
            yield (
                "teacher_rollout writes held-out text and its evaluation before the other pools "
                "start, and ends: no step reads it (distill.measure_every=null does without)"
            )
        elif not readers:
            yield f"not started: {name} (nobody reads it)"
        elif name == "teacher_scoring" and readers == (MEASURES,):
            yield (
                f"teacher_scoring is started for {MEASURES} alone "
                "(distill.measure_every=null does without)"
            )


def _fitted_warmups(config: RunConfig) -> Iterator[str]:
    for key, optimizer, steps in _optimizers(config):
        asked, taken = optimizer.warmup_steps, optimizer.num_warmup_steps(steps)
        if asked is not None and optimizer.warmup_ratio is None and taken < asked:
            yield (
                f"{key}.optimizer.warmup_steps={asked} is more than half of {key}.steps={steps}: "
                f"warm-up takes {taken} steps, so that the learning rate comes near its peak"
            )


def _optimizers(config: RunConfig) -> Iterator[tuple[str, OptimizerConfig, int]]:
    for role in ("teacher", "student"):
        sft = getattr(config, role).sft
        if sft is not None:
            yield f"{role}.sft", sft.optimizer, sft.steps
    yield "distill", config.distill.optimizer, config.distill.steps
