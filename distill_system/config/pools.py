"""Workers and what they ask of the cluster; how long anything may take."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from distill_system.config.base import ConfigModel


class PoolConfig(ConfigModel):
    """One pool of workers and what each of its workers asks of the cluster."""

    count: PositiveInt = 1
    """Number of workers."""
    cpus: NonNegativeFloat = 1.0
    """CPUs per worker."""
    gpus: NonNegativeFloat = 0.0
    """GPUs per worker; more than one in a rollout pool is tensor parallelism."""
    custom_resources: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Ray custom resources per worker."""


class PoolsConfig(ConfigModel):
    """Each kind of worker is counted and placed by itself."""

    student_rollout: PoolConfig = PoolConfig()
    teacher_rollout: PoolConfig = PoolConfig()
    teacher_scoring: PoolConfig = PoolConfig()
    learner: PoolConfig = PoolConfig()

    @model_validator(mode="after")
    def _check(self) -> PoolsConfig:
        if (self.learner.gpus > 0) != (self.student_rollout.gpus > 0):
            raise ValueError(
                "learner and student_rollout must both have GPUs or both have none: weights travel "
                f"over NCCL or over gloo, got learner.gpus={self.learner.gpus} and "
                f"student_rollout.gpus={self.student_rollout.gpus}"
            )
        if self.learner.gpus not in (0.0, 1.0):
            raise ValueError(f"a learner rank has 0 or 1 GPU, got learner.gpus={self.learner.gpus}")
        return self


class DeadlinesConfig(ConfigModel):
    """Longest waits, in seconds; each ends the run with what was waited for."""

    resources_seconds: PositiveFloat = 300.0
    """For the cluster to place the workers."""
    start_seconds: PositiveFloat = 600.0
    """For a worker to load its model."""
    call_seconds: PositiveFloat = 1800.0
    """For one call of a worker: a step, a batch of rollouts, a batch of scores."""
    publish_seconds: PositiveFloat = 300.0
    """For one weight version to reach every rollout worker."""


class ClusterConfig(ConfigModel):
    """The Ray cluster: the one of RAY_ADDRESS is joined, or a local one is started."""

    dashboard: bool = True
    """Start the Ray dashboard of a local cluster, on localhost."""
