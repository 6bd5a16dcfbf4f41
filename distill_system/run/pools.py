"""The workers of a run: which classes, with which arguments, on which resources."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from distill_system.cluster import (
    ClusterSession,
    ElasticPool,
    RayWorkers,
    SupervisedWorkers,
    WorkerRequest,
)
from distill_system.config import RunConfig
from distill_system.config.model import ModelConfig
from distill_system.learner import LearnerGroup, ModelSource
from distill_system.records import Author
from distill_system.rollout import RolloutPool
from distill_system.run.context import RunContext
from distill_system.run.transfer_group import TransferGroup
from distill_system.run.vocabulary import vocabulary_size
from distill_system.run.worker_requests import (
    evaluation_request,
    learner_request,
    reading_request,
    rollout_request,
    scoring_request,
    tensor_parallel_size,
)
from distill_system.scoring import ScoringPool
from distill_system.workers import Supervision


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """The pools of a distillation, loaded and connected.

    evaluation: the workers that generate for the student's evaluations: a pool of their own, or
    `students` if none is configured.
    ranks: the learner's processes.
    weights: how the learner's weights reach the student's engines.
    placed: every started pool but the learner, by name: those whose workers are replaced when they
    are lost, and may come and go where their bounds allow it.

    A pool that nobody reads (RunConfig.pool_readers) is not started, and has no workers.
    """

    students: RolloutPool
    teachers: RolloutPool
    scorers: ScoringPool
    learner: LearnerGroup
    ranks: RayWorkers
    evaluation: RolloutPool
    weights: TransferGroup
    placed: Mapping[str, ElasticPool]

    def supervise(self, supervision: Supervision) -> None:
        """From now on, losses of workers are told to this, and calls are made again."""
        self.weights.supervise(supervision, self.placed)
        for workers in self._supervised():
            workers.supervision = supervision

    def forget_calls(self) -> None:
        """Nobody waits any more for what is under way: it is not made again."""
        for workers in self._supervised():
            workers.forget_all()

    def _supervised(self) -> list[SupervisedWorkers]:
        found = []
        for pool in (self.students, self.teachers, self.scorers, self.evaluation):
            assert isinstance(pool.workers, SupervisedWorkers), "open_pools makes them so"
            found.append(pool.workers)
        return found


def open_pools(context: RunContext, *, student_path: str) -> Pools:
    """Start all pools that somebody reads at once, wait until all are ready, connect learner and
    student rollouts."""
    requests = _distillation_requests(context, student_path)
    counts = ", ".join(f"{request.name} x{len(request.arguments)}" for request in requests)
    context.view.note(f"starting workers: {counts}")
    began = time.monotonic()
    # All workers load at the same time from here on; the waits below only collect them.
    placed = context.cluster.start_pools(requests)
    started = {request.name: workers for request, workers in zip(requests, placed, strict=True)}
    ranks = started.pop("learner")
    learner = connect_learner(context, ranks)
    for workers in started.values():
        _wait_until_ready(context.config, workers)
    context.view.note(f"all workers are ready, after {time.monotonic() - began:.0f} s")
    supervised = {
        name: SupervisedWorkers(name, started.get(name) or _nobody(context, name))
        for name in context.config.pools.by_name
    }
    students = RolloutPool(supervised["student_rollout"])
    separate = supervised.get("evaluation")
    return Pools(
        students=students,
        teachers=RolloutPool(supervised["teacher_rollout"]),
        scorers=ScoringPool(supervised["teacher_scoring"]),
        learner=learner,
        ranks=ranks,
        evaluation=students if separate is None else RolloutPool(separate),
        weights=_join_for_transfer(context, learner, started),
        placed={
            request.name: ElasticPool(workers=started[request.name], request=request)
            for request in requests
            if request.name in started
        },
    )


def _distillation_requests(context: RunContext, student_path: str) -> list[WorkerRequest]:
    config = context.config
    requests = [
        rollout_request(context, "student_rollout", Author.STUDENT, student_path),
        rollout_request(context, "teacher_rollout", Author.TEACHER, context.teacher_path),
        scoring_request(context),
        learner_request(
            context,
            name="learner",
            source=ModelSource(
                path=student_path,
                trust_remote_code=config.student.trust_remote_code,
                teacher_path=context.teacher_path,
                teacher_dtype=config.scoring.dtype,
                vocabulary_size=vocabulary_size(context.tokenizer),
                update=config.distill.update,
                action_dimension=config.distill.action_dimension,
            ),
            objective=config.distill.objective,
            compute_dtype=config.learner.compute_dtype,
            optimizer=config.distill.optimizer,
            total_steps=config.distill.steps,
        ),
    ]
    if config.pools.evaluation is not None:
        requests.append(rollout_request(context, "evaluation", Author.STUDENT, student_path))
    started = config.started_pools
    return [
        replace(request, colocate_with=started[request.name].colocate_with)
        for request in requests
        if request.name in started
    ]


def _nobody(context: RunContext, name: str) -> RayWorkers:
    """A pool that is not started."""
    seconds, monitor = context.config.deadlines.call_seconds, context.cluster.monitor
    return RayWorkers(name, [], [], call_seconds=seconds, monitor=monitor)


Standing = tuple[SupervisedWorkers, dict[str, ElasticPool]]
"""Workers of a pool that stands by itself, and how they are replaced, by the pool's name."""


@contextmanager
def teacher_engines(context: RunContext) -> Iterator[Standing]:
    """The teacher's engines alone, before the other pools start; they end with the block."""
    request = rollout_request(context, "teacher_rollout", Author.TEACHER, context.teacher_path)
    workers = context.cluster.start_workers(request)
    try:
        _wait_until_ready(context.config, workers)
        yield _standing(request, workers)
    finally:
        context.cluster.stop_workers(workers)


def connect_learner(context: RunContext, workers: RayWorkers) -> LearnerGroup:
    """A learner group whose ranks have loaded the model and connected to one another."""
    group = LearnerGroup(workers)
    _wait_until_ready(context.config, workers)
    group.connect()
    return group


def restart_learner(context: RunContext, ranks: RayWorkers, learner: LearnerGroup) -> None:
    """Start every rank of a learner anew, in their places, with the model they began from.

    Raises: ResourceError, DeadlineError, WorkerLostError, or what a rank raised while loading.
    """
    context.cluster.restart_gang(ranks)
    _wait_until_ready(context.config, ranks)
    learner.connect()


def model_source(context: RunContext, model: ModelConfig) -> ModelSource:
    """The model that supervised fine-tuning starts from, for the learner's ranks to load."""
    tokenizer = context.tokenizer
    return ModelSource(
        path=model.path,
        architecture=model.architecture,
        vocabulary_size=vocabulary_size(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        trust_remote_code=model.trust_remote_code,
    )


def _join_for_transfer(
    context: RunContext, learner: LearnerGroup, started: Mapping[str, RayWorkers]
) -> TransferGroup:
    # Evaluation workers hold the student too, so every version is sent to them as well.
    receivers = [started[name] for name in ("student_rollout", "evaluation") if name in started]
    pools = context.config.pools.by_name
    return TransferGroup(
        learner,
        receivers,
        context.cluster.monitor,
        backend=context.config.transfer_backend,
        ranks={workers.name: tensor_parallel_size(pools[workers.name]) for workers in receivers},
        seconds=context.config.deadlines.publish_seconds,
    )


def open_evaluation_pool(
    config: RunConfig, cluster: ClusterSession, tokenizer: Any, *, path: str
) -> Standing:
    """Workers that hold the model in `path` and generate for its evaluation."""
    request = evaluation_request(config, tokenizer, path)
    workers = cluster.start_workers(request)
    _wait_until_ready(config, workers)
    return _standing(request, workers)


def _standing(request: WorkerRequest, workers: RayWorkers) -> Standing:
    placed = {request.name: ElasticPool(workers=workers, request=request)}
    return SupervisedWorkers(request.name, workers), placed


def open_reading_pool(
    config: RunConfig, cluster: ClusterSession, tokenizer: Any, *, path: str
) -> ScoringPool:
    """Workers that hold the model in `path` and say what it thinks of text."""
    workers = cluster.start_workers(reading_request(config, tokenizer, path))
    _wait_until_ready(config, workers)
    return ScoringPool(workers)


def _wait_until_ready(config: RunConfig, workers: RayWorkers) -> None:
    """Wait until every worker has loaded its model.

    Raises: what a worker raised while loading; DeadlineError after deadlines.start_seconds.
    """
    workers.finish(
        [workers.start(worker_id, "ready") for worker_id in workers.members],
        what="the workers to load their model",
        seconds=config.deadlines.start_seconds,
    )
