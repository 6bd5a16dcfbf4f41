"""Configuration of workers: their numbers and resources, scaling, deadlines, the cluster."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from distill_system.config.base import ConfigModel

ElasticPool = Literal["student_rollout", "teacher_rollout", "teacher_scoring"]
"""Pools whose workers may come and go while a run goes on."""

ELASTIC_POOLS: tuple[ElasticPool, ...] = get_args(ElasticPool)

_MAY_COLOCATE = {"teacher_scoring": "teacher_rollout", "evaluation": "student_rollout"}


MOST_WORKERS = 10_000
"""Of a pool; each has a placement group of its own, and more would not be placed in any time."""

NumWorkers = Annotated[int, Field(gt=0, le=MOST_WORKERS)]

_OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")
"""Ray's own names, which custom resources may not have."""


class PoolConfig(ConfigModel):
    """One pool of workers and what each of its workers asks of the cluster."""

    count: NumWorkers = 1
    """Number of workers; where min_count or max_count is given, the number it begins with."""
    min_count: NumWorkers | None = None
    """The fewest workers while the run goes on; null: count. For student_rollout, teacher_rollout
    and teacher_scoring."""
    max_count: NumWorkers | None = None
    """The most workers while the run goes on; null: count. For the same three pools."""
    cpus: NonNegativeFloat = 1.0
    """CPUs per worker; of a scorer of several ranks (scoring.shard_ranks), per rank."""
    gpus: NonNegativeFloat = 0.0
    """GPUs per worker, whole ones or a share of one; more than one in a rollout pool is tensor
    parallelism. Of a scorer of several ranks, per rank."""
    custom_resources: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Ray custom resources per worker."""
    colocate_with: Literal["teacher_rollout", "student_rollout"] | None = None
    """Place worker i on the node of worker i of that pool, and on its GPU if each takes a share of
    one: teacher_scoring with teacher_rollout, evaluation with student_rollout. Their counts must be
    equal and fixed."""

    @property
    def fewest(self) -> int:
        """min_count, or count where it is null."""
        return self.count if self.min_count is None else self.min_count

    @property
    def most(self) -> int:
        """max_count, or count where it is null."""
        return self.count if self.max_count is None else self.max_count

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while a run goes on."""
        return self.fewest < self.most

    @field_validator("custom_resources")
    @classmethod
    def _check_resources(cls, resources: dict[str, float]) -> dict[str, float]:
        for name in resources:
            if not name.strip() or not name.isprintable() or name in _OWN_RESOURCES:
                raise ValueError(
                    f"expected the name of a custom resource as `ray start --resources` gives it, "
                    f"got {name!r}; CPUs and GPUs are cpus and gpus"
                )
        return resources

    @model_validator(mode="after")
    def _check(self) -> PoolConfig:
        if not self.fewest <= self.count <= self.most:
            raise ValueError(
                "expected min_count <= count <= max_count, got "
                f"{self.fewest}, {self.count} and {self.most}"
            )
        if self.gpus > 1.0 and not self.gpus.is_integer():
            raise ValueError(
                f"a worker has whole GPUs or a share of one: expected gpus <= 1 or a whole number, "
                f"got {self.gpus}"
            )
        return self


class PoolsConfig(ConfigModel):
    """The pools of workers, one for each kind."""

    student_rollout: PoolConfig = PoolConfig()
    teacher_rollout: PoolConfig = PoolConfig()
    teacher_scoring: PoolConfig = PoolConfig()
    learner: PoolConfig = PoolConfig()
    evaluation: PoolConfig | None = None
    """Rollout workers that hold the student for evaluations alone, with rollout.student_engine;
    null: those of student_rollout evaluate, and generate nothing else meanwhile."""

    @property
    def by_name(self) -> dict[str, PoolConfig]:
        """The configured pools by name; `evaluation` is missing where it is null."""
        pools = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: pool for name, pool in pools.items() if pool is not None}

    @model_validator(mode="after")
    def _check_devices(self) -> PoolsConfig:
        if self.learner.gpus > 1.0:
            raise ValueError(
                f"a learner rank has a GPU, a share of one or none: expected learner.gpus of at "
                f"most 1, got {self.learner.gpus}"
            )
        if self.learner.count > 1 and 0.0 < self.learner.gpus < 1.0:
            raise ValueError(
                "learner ranks meet over NCCL, which wants a GPU of its own for each: expected "
                f"learner.gpus of 0 or 1 for learner.count={self.learner.count}, got "
                f"{self.learner.gpus}"
            )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> PoolsConfig:
        for name, pool in self.by_name.items():
            given = (pool.min_count, pool.max_count)
            if name not in ELASTIC_POOLS and given != (None, None):
                raise ValueError(
                    f"{name} keeps its size while a run goes on: expected min_count and max_count "
                    f"null, got {given}; pools that may change are {', '.join(ELASTIC_POOLS)}"
                )
            if pool.colocate_with is not None:
                self._check_colocated(name, pool, pool.colocate_with)
        return self

    def _check_colocated(self, name: str, pool: PoolConfig, other_name: str) -> None:
        other: PoolConfig = getattr(self, other_name)
        if _MAY_COLOCATE.get(name) != other_name:
            allowed = [f"{one} with {two}" for one, two in _MAY_COLOCATE.items()]
            raise ValueError(
                f"{name}.colocate_with={other_name}: workers that may stand side by side are "
                f"{' and '.join(allowed)}"
            )
        if pool.count != other.count or pool.is_elastic or other.is_elastic:
            counts = [(one.fewest, one.count, one.most) for one in (pool, other)]
            raise ValueError(
                f"{name} and {other_name} stand side by side, one with one: expected equal counts "
                f"without room to change, got min_count, count, max_count of {counts[0]} and "
                f"{counts[1]}"
            )
        shares = (pool.gpus, other.gpus)
        if any(not share.is_integer() for share in shares) and sum(shares) > 1.0:
            raise ValueError(
                f"{name} and {other_name} share one GPU: expected shares of at most 1 together, "
                f"got gpus of {shares[0]} and {shares[1]}"
            )


Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class ScalingConfig(ConfigModel):
    """When a run changes its pools by itself, within their min_count and max_count. The command
    `distill-system scale` works whatever these keys say."""

    automatic: bool = False
    """Let the run add a worker to the pool that the learner waits for, and remove one from a pool
    that is itself idle."""
    look_every_seconds: PositiveFloat = 10.0
    """Time between two observations, over which each pool's busy and idle shares are measured."""
    patience: PositiveInt = 3
    """Number of observations in a row that must agree, all to grow or all to shrink, before a
    worker is added or removed."""
    cool_down_seconds: NonNegativeFloat = 60.0
    """After a change, nothing else is changed for this long, so that its effect shows first."""
    starved_share: Share = 0.1
    """Share of its time that the learner may wait; if it waits longer, the pool that it waits for
    grows."""
    spare_share: Share = 0.1
    """A pool shrinks only if the workers that stay would still be idle for this share of their
    time, so that it need not grow again."""


class DeadlinesConfig(ConfigModel):
    """Longest waits, in seconds. A longer one ends the run with an error that names what did not
    come."""

    resources_seconds: PositiveFloat = 300.0
    """For the cluster to place the workers."""
    start_seconds: PositiveFloat = 600.0
    """For a worker to load its model."""
    call_seconds: PositiveFloat = 1800.0
    """For one call of a worker: a step, a batch of rollouts, a batch of scores."""
    publish_seconds: PositiveFloat = 300.0
    """For one weight version to reach every rollout worker."""
    stop_seconds: PositiveFloat = 60.0
    """After Ctrl-C or SIGTERM, for the step under way and a checkpoint of it; then the run ends
    with the checkpoint before. A second signal ends it at once."""


class FaultsConfig(ConfigModel):
    """What a run does about workers that die, hang or fail. A lost rollout worker, scorer or
    evaluation worker is replaced; a lost learner rank starts all ranks anew from the newest
    checkpoint; the run goes on."""

    max_replacements: NonNegativeInt = 10
    """Workers of one pool that are replaced within within_seconds; one more ends the run with its
    own error. 0 ends it at the first."""
    within_seconds: PositiveFloat = 3600.0
    """The time over which max_replacements counts."""
    fatal_prompts: Literal["end", "leave_out"] = "end"
    """A prompt that costs a worker each time it is answered: its name ends the run, or it is left
    out of the steps that draw it, and told."""


class ClusterConfig(ConfigModel):
    """The Ray cluster: the one of RAY_ADDRESS is joined, or a local one is started."""

    dashboard: bool = True
    """Start the Ray dashboard of a local cluster."""
    listen_on: Literal["localhost", "network"] = "localhost"
    """Who reaches a local cluster, its metrics and its dashboard: this machine alone, or every
    machine that reaches this one (docs/security.md). A cluster that is joined listens as it was
    started."""
    network_interface: Annotated[str, Field(min_length=1)] | None = None
    """Network interface over which learner ranks and rollout workers connect, such as eth0 or ib0:
    gloo and NCCL are told it on every node. Null: gloo takes the one that holds the node's address
    as Ray knows it, NCCL chooses by itself."""


class LoggingConfig(ConfigModel):
    """The log files in the run's folder: one for the driver, one for each worker."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines below this level are left out."""
    json_lines: bool = False
    """Write each line as a JSON object: time, level, logger, message, traceback."""
