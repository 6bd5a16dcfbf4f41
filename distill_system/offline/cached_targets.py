"""Stores the teacher's targets of stored samples, if a person asks for it with --cache-targets.

The command reports their size first: targets take thousands of numbers for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow

from distill_system.cluster.batch_inference import infer_batches
from distill_system.config import RunConfig
from distill_system.config.objective import TeacherNeeds
from distill_system.data import (
    Selection,
    StoredTrajectories,
    TargetStore,
    read_trajectories,
)
from distill_system.data.target_store import require_room, target_folder
from distill_system.errors import ConfigError
from distill_system.observe import LiveView, RunDirectory
from distill_system.offline.samples import cut_batches
from distill_system.offline.workers import TargetWriter
from distill_system.planning import ModelShape, read_shape
from distill_system.records import Author
from distill_system.run.sample_origin import describe_reading, sample_origin
from distill_system.run.worker_requests import scorer_arguments, torch_environment

BATCH_BYTES = 64 * 2**20
"""Size of the targets that one call returns, and that one part holds."""


def compute_targets(
    config: RunConfig,
    samples: pyarrow.Table,
    *,
    arguments: Mapping[str, Any],
    needs: TeacherNeeds,
    reading: str,
    most_rows: int,
) -> Iterator[pyarrow.Table]:
    """Tables of targets of these samples, as the scorers finish them; call it in a ClusterSession.

    arguments: of TeacherScorer.  reading: see TargetStore.  most_rows: of one call.
    """
    pool = config.pools.teacher_scoring
    return infer_batches(
        cut_batches(samples, num_workers=pool.count, most_rows=most_rows),
        TargetWriter,
        {"arguments": arguments, "needs": needs, "reading": reading},
        pool=pool,
        environment=torch_environment(config, pool, config.scoring.threads),
        deadlines=config.deadlines,
    )


def require_single_ranks(config: RunConfig, what: str) -> None:
    """Refuse scorers of several ranks, which Ray Data does not place.  Raises: ConfigError."""
    if config.scoring.shard_ranks > 1:
        raise ConfigError(
            f"{what} computes with scorers of one rank each: expected scoring.shard_ranks=1, got "
            f"{config.scoring.shard_ranks}. Runs let several ranks share a teacher"
        )


class CachedTargets:
    """The off-policy targets of a run's teacher for the samples of one store."""

    def __init__(self, config: RunConfig, run: RunDirectory, tokenizer: Any, folder: Path) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._folder = folder
        self._teacher = sample_origin(config, run, tokenizer, Author.TEACHER)
        self._needs = config.distill.objective.teacher_needs("off_policy")
        self._store = TargetStore(folder, describe_reading(config, self._teacher.model_fingerprint))

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of the samples whose targets are not stored yet."""
        return [key for key in keys if key not in self._store]

    def describe_cost(self, num_samples: int) -> str:
        """A message on how much the targets of num_samples samples take at most."""
        num_tokens = num_samples * self._teacher.max_response_tokens
        gibibytes = self._predict(num_tokens) / 2**30
        return (
            f"the teacher's targets of {num_samples} samples take up to {gibibytes:.3g} GiB "
            f"({self._predict(1)} bytes a token); --cache-targets keeps them in the store"
        )

    def require_room(self, num_stored_tokens: int, num_unwritten: int) -> None:
        """Check that the disk has room for the targets, before anything is computed.

        num_stored_tokens: response tokens of stored samples without targets.
        num_unwritten: samples that have yet to be generated.
        Raises: DataError; ConfigError if the objective needs no targets of the teacher.
        """
        require_single_ranks(self._config, "--cache-targets")
        if not self._needs.anything:
            raise ConfigError(
                f"--cache-targets: objective.type={self._config.distill.objective.type} asks "
                "nothing of the teacher off-policy; leave the option out"
            )
        num_tokens = num_stored_tokens + num_unwritten * self._teacher.max_response_tokens
        require_room(target_folder(self._folder), self._predict(num_tokens))

    def fill(self, keys: Sequence[str], view: LiveView) -> None:
        """Compute and store the missing targets of these samples; call it in a ClusterSession."""
        missing = self.missing(keys)
        first = len(keys) - len(missing)
        task = view.start("cache targets", len(keys), first_step=first)
        for rows in self._compute(missing) if missing else ():
            self._store.append(rows)
            done = task.step + rows.num_rows
            task.update(done, {"samples/s": (done - first) / task.elapsed_seconds})
        task.finish()

    def stored_tokens(self, keys: Sequence[str]) -> int:
        """Response tokens of these samples, which are in the store."""
        return self._select(keys).num_response_tokens if keys else 0

    def _compute(self, keys: Sequence[str]) -> Iterator[pyarrow.Table]:
        """Tables of targets, as the workers finish them."""
        return compute_targets(
            self._config,
            self._select(keys).to_table(),
            arguments=scorer_arguments(self._config, self._tokenizer, self._teacher.model),
            needs=self._needs,
            reading=self._store.reading,
            most_rows=BATCH_BYTES // (self._teacher.max_response_tokens * self._predict(1)),
        )

    def _select(self, keys: Sequence[str]) -> StoredTrajectories:
        wanted = Selection(keys=set(keys))
        return read_trajectories(self._folder, self._teacher.tokenizer_fingerprint, wanted)

    @cached_property
    def _shape(self) -> ModelShape:
        trusted = self._config.teacher.trust_remote_code
        return read_shape(self._teacher.model, key="teacher.path", trust_remote_code=trusted)

    def _predict(self, num_tokens: int) -> int:
        config, shape = self._config, self._shape
        most = config.distill.action_dimension
        return num_tokens * self._needs.bytes_per_token(
            hidden=shape.row_size,
            actions=shape.embedding_size if most is None else min(most, shape.embedding_size),
            half=config.scoring.dtype == "bfloat16",
        )
