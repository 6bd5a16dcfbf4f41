"""The workers of a run: which classes, with which arguments, on which resources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from distill_system.cluster import (
    ClusterSession,
    ElasticPool,
    EveryWorker,
    RayWorkers,
    WorkerRequest,
    all_named_handles,
)
from distill_system.config import RunConfig
from distill_system.config.model import ModelConfig
from distill_system.config.pools import ELASTIC_POOLS
from distill_system.learner import LearnerGroup, ModelSource
from distill_system.records import Author
from distill_system.rollout import RolloutPool
from distill_system.run.context import RunContext
from distill_system.run.vocabulary import vocabulary_size
from distill_system.run.worker_arguments import tensor_parallel_size
from distill_system.run.worker_requests import (
    evaluation_request,
    learner_request,
    rollout_request,
    scoring_request,
    transfer_backend,
)
from distill_system.scoring import ScoringPool
from distill_system.weights import FanOutClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """The pools of a distillation, loaded and connected.

    evaluation: the workers that generate for the student's evaluations: a pool of their own, or
    `students` if none is configured.
    elastic: the pools whose size may change, by name.
    connect_rollouts: opens the weight-transfer group anew with the present student workers. Call it
    after workers joined or left, before the next publish.
    """

    students: RolloutPool
    teachers: RolloutPool
    scorers: ScoringPool
    learner: LearnerGroup
    evaluation: RolloutPool
    elastic: Mapping[str, ElasticPool]
    connect_rollouts: Callable[[], None]


def open_pools(context: RunContext, *, student_path: str) -> Pools:
    """Start all pools at once, wait until all are ready, connect learner and student rollouts."""
    requests = _distillation_requests(context, student_path)
    # All workers load at the same time from here on; the waits below only collect them.
    placed = context.cluster.start_pools(requests)
    started = {request.name: workers for request, workers in zip(requests, placed, strict=True)}
    learner = connect_learner(context, started.pop("learner"))
    for workers in started.values():
        wait_until_ready(context, workers)
    students = RolloutPool(started["student_rollout"])
    evaluation = started.get("evaluation")
    # Evaluation workers hold the student too, so every version is sent to them as well.
    receivers = [started["student_rollout"], *([evaluation] if evaluation is not None else [])]
    connect = partial(_connect_rollouts, context, learner, receivers)
    connect()
    return Pools(
        students=students,
        teachers=RolloutPool(started["teacher_rollout"]),
        scorers=ScoringPool(started["teacher_scoring"]),
        learner=learner,
        evaluation=students if evaluation is None else RolloutPool(evaluation),
        elastic={
            request.name: ElasticPool(workers=started[request.name], request=request)
            for request in requests
            if request.name in ELASTIC_POOLS
        },
        connect_rollouts=connect,
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
    return requests


def connect_learner(context: RunContext, workers: RayWorkers) -> LearnerGroup:
    """A learner group whose ranks have loaded the model and connected to one another."""
    group = LearnerGroup(workers)
    wait_until_ready(context, workers)
    group.connect()
    return group


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


def _connect_rollouts(
    context: RunContext, learner: LearnerGroup, receivers: Sequence[RayWorkers]
) -> None:
    """Open the weight-transfer group between learner rank 0 and every engine of these pools."""
    # Ranks of each worker, in the order in which all_named_handles lists the workers.
    pools, seconds = context.config.pools.by_name, context.config.deadlines.publish_seconds
    sizes = [
        tensor_parallel_size(pools[workers.name]) for workers in receivers for _ in workers.members
    ]
    client = FanOutClient(EveryWorker(all_named_handles(receivers), seconds=seconds), sizes)
    learner.connect_rollouts(transfer_backend(context), client, client.num_receivers, seconds)


def open_evaluation_pool(
    config: RunConfig, cluster: ClusterSession, tokenizer: Any, *, path: str
) -> RolloutPool:
    """Workers that hold the model in `path` and generate for its evaluation."""
    workers = cluster.start_workers(evaluation_request(config, tokenizer, path))
    _wait_until_ready(workers, config.deadlines.start_seconds)
    return RolloutPool(workers)


def wait_until_ready(context: RunContext, workers: RayWorkers) -> None:
    """Wait until every worker has loaded its model.

    Raises: what a worker raised while loading; DeadlineError after deadlines.start_seconds.
    """
    _wait_until_ready(workers, context.config.deadlines.start_seconds)


def _wait_until_ready(workers: RayWorkers, seconds: float) -> None:
    workers.finish(
        [workers.start(worker_id, "ready") for worker_id in workers.members],
        what="the workers to load their model",
        seconds=seconds,
    )
