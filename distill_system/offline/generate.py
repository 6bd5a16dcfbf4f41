"""`distill-system generate`: fill a trajectory store ahead of any run, over many workers.

Prompts of data.prompts in, samples of one of the run's models out, written by the same engines that
a run starts. What stands in the store is not done again, so that a killed command goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow

from distill_system.cluster import ClusterSession
from distill_system.cluster.batch_inference import infer_batches
from distill_system.config import RunConfig
from distill_system.data import SampleOrigin, TrajectoryStore, load_run_data, store_path
from distill_system.errors import ConfigError
from distill_system.observe import LiveView
from distill_system.offline.cached_targets import CachedTargets
from distill_system.offline.samples import SampleKeeper, cut_batches, plan_samples
from distill_system.offline.workers import SampleWriter
from distill_system.records import Author
from distill_system.run.preparation import open_run, prepare_tokenizer, record_start
from distill_system.run.sample_origin import sample_origin
from distill_system.run.worker_arguments import (
    rollout_arguments,
    rollout_environment,
    rollout_pool,
)

FILLS_OF_AN_ENGINE = 4
"""Prompts of one call, in what an engine decodes at once: at the end of a call it runs dry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What is to stand in the store.

    out: folder of the store; None: data.trajectory_store.  num_prompts: None takes all.
    cache_targets: keep what the teacher says of the samples, too.
    """

    config: RunConfig
    author: Author = Author.TEACHER
    out: Path | None = None
    num_prompts: int | None = None
    samples_per_prompt: int = 1
    cache_targets: bool = False


def generate(request: GenerateRequest) -> Path:
    """Write the samples that are not there yet; returns the folder of the store.

    Raises: DistillError with one message for the person; every worker is ended first, and what was
        finished stands in the store.
    """
    config, folder = request.config, _folder(request)
    run = open_run(config)
    record_start(config, run)
    tokenizer = prepare_tokenizer(config, run)
    origin = sample_origin(config, run, tokenizer, request.author)
    store = TrajectoryStore(folder, origin.tokenizer_fingerprint)
    targets = CachedTargets(config, run, tokenizer, folder)
    prompts = load_run_data(config, tokenizer, ["prompts"]).prompts
    samples = plan_samples(
        prompts,
        origin,
        num_prompts=request.num_prompts,
        samples_per_prompt=request.samples_per_prompt,
    )
    with LiveView(f"{config.name}: {folder}") as view:
        _Generation(request, tokenizer, origin, store, targets, view).make(samples)
    return folder


class _Generation:
    """One call of the command, from the samples asked for to a store that holds them."""

    def __init__(
        self,
        request: GenerateRequest,
        tokenizer: Any,
        origin: SampleOrigin,
        store: TrajectoryStore,
        targets: CachedTargets,
        view: LiveView,
    ) -> None:
        self.request = request
        self.tokenizer = tokenizer
        self.origin = origin
        self.store = store
        self.targets = targets
        self.view = view

    def make(self, samples: pyarrow.Table) -> None:
        """Write what is missing of the samples, and of their targets if those are wanted."""
        keys = samples["key"].to_pylist()
        there = self.store.has(keys)
        todo = samples.filter(pyarrow.array(~there))
        self.view.note(f"{len(keys)} samples asked for, {len(keys) - todo.num_rows} stand there")
        self.view.note(self.targets.describe_cost(len(keys)))
        unread: list[str] = []
        if self.request.cache_targets:
            unread = self.targets.missing(keys)
            unwritten = set(todo["key"].to_pylist())
            stored = [key for key in unread if key not in unwritten]
            self.targets.require_room(self.targets.stored_tokens(stored), todo.num_rows)
        if todo.num_rows or unread:
            with ClusterSession(self.request.config, notify=self.view.note):
                self._write(todo, total=len(keys))
                if unread:
                    self.targets.fill(keys, self.view)

    def _write(self, todo: pyarrow.Table, *, total: int) -> None:
        if todo.num_rows:
            task = self.view.start("generate", total, first_step=total - todo.num_rows)
            SampleKeeper(self.store, self.tokenizer, task).keep(self._written(todo))

    def _written(self, todo: pyarrow.Table) -> Iterator[pyarrow.Table]:
        """Samples as they are finished."""
        config, author = self.request.config, self.request.author
        pool = rollout_pool(config, author)
        arguments = rollout_arguments(config, self.tokenizer, author, self.origin.model)
        most = FILLS_OF_AN_ENGINE * arguments["engine"].max_num_sequences
        return infer_batches(
            cut_batches(todo, num_workers=pool.count, most_rows=most),
            SampleWriter,
            {"arguments": arguments, "origin": self.origin},
            pool=pool,
            environment=rollout_environment(config, author),
            deadlines=config.deadlines,
        )


def _folder(request: GenerateRequest) -> Path:
    if request.out is not None:
        return request.out.absolute()
    if request.config.data.trajectory_store is None:
        raise ConfigError(
            "no folder to write to: give data.trajectory_store, from which runs read it, or --out"
        )
    return store_path(request.config.data).absolute()
