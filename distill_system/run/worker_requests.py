"""The worker requests of a run, pool by pool."""

from __future__ import annotations

from typing import Any

import torch

from distill_system.cluster import WorkerRequest
from distill_system.config import RunConfig
from distill_system.config.model import OptimizerConfig
from distill_system.config.objective import ObjectiveConfig
from distill_system.config.pools import PoolConfig
from distill_system.learner import Learner, ModelSource
from distill_system.logs import log_environment
from distill_system.observe.run_gauges import EngineGauges
from distill_system.records import Author
from distill_system.rollout import RolloutWorker
from distill_system.run.context import RunContext
from distill_system.run.stored_targets import find_stored_targets
from distill_system.run.worker_arguments import (
    rollout_arguments,
    rollout_environment,
    scorer_arguments,
    torch_environment,
)
from distill_system.scoring import RankedScorer, TeacherScorer
from distill_system.seeds import derive_seed
from distill_system.weights import WireFormat
from distill_system.weights.rounding import AS_THEY_ARE


def rollout_request(context: RunContext, name: str, author: Author, path: str) -> WorkerRequest:
    """A pool of rollout workers of the model in `path`; only the student's workers receive weights.

    name: student_rollout, teacher_rollout or evaluation.
    """
    config, pool = context.config, context.config.pools.by_name[name]
    shared = {
        **rollout_arguments(config, context.tokenizer, author, path, pool),
        "load_report": EngineGauges(run=config.name, pool=name),
        "weight_transfer_backend": transfer_backend(context) if author is Author.STUDENT else None,
    }
    return WorkerRequest(
        name=name,
        worker_class=RolloutWorker,
        arguments=[{"name": f"{name}-{index}", **shared} for index in range(pool.count)],
        pool=pool,
        environment={**rollout_environment(config, author, pool), **_logs(context)},
        colocate_with=pool.colocate_with,
    )


def evaluation_request(config: RunConfig, tokenizer: Any, path: str) -> WorkerRequest:
    """The workers that generate for evaluations, of the model in `path`, which stays as it is."""
    name = "student_rollout" if config.pools.evaluation is None else "evaluation"
    pool = config.pools.by_name[name]
    shared = {
        **rollout_arguments(config, tokenizer, Author.STUDENT, path, pool),
        "load_report": EngineGauges(run=config.name, pool=name),
    }
    return WorkerRequest(
        name=name,
        worker_class=RolloutWorker,
        arguments=[{"name": f"{name}-{index}", **shared} for index in range(pool.count)],
        pool=pool,
        environment=rollout_environment(config, Author.STUDENT, pool),
    )


def scoring_request(context: RunContext) -> WorkerRequest:
    """The pool of teacher scorers."""
    config, pool = context.config, context.config.pools.teacher_scoring
    ranks = config.scoring.shard_ranks
    arguments = {
        **scorer_arguments(config, context.tokenizer, context.teacher_path),
        # Targets that a scorer looks up instead of computing them.
        "known_targets": find_stored_targets(context),
    }
    if ranks > 1:
        seconds = config.deadlines.call_seconds
        arguments |= {"num_ranks": ranks, "timeout_seconds": seconds}
    return WorkerRequest(
        name="teacher_scoring",
        worker_class=TeacherScorer if ranks == 1 else RankedScorer,
        arguments=[arguments] * pool.count,
        pool=pool,
        ranks=ranks,
        environment={**torch_environment(config, pool, config.scoring.threads), **_logs(context)},
        colocate_with=pool.colocate_with,
    )


def reading_request(config: RunConfig, tokenizer: Any, path: str) -> WorkerRequest:
    """Workers that say what the model in `path` thinks of text, on the scorers' resources."""
    pool = config.pools.teacher_scoring
    return WorkerRequest(
        name="teacher_scoring",
        worker_class=TeacherScorer,
        arguments=[scorer_arguments(config, tokenizer, path)] * pool.count,
        pool=pool,
        environment=torch_environment(config, pool, config.scoring.threads),
    )


def learner_request(
    context: RunContext,
    *,
    name: str,
    source: ModelSource,
    objective: ObjectiveConfig | None,
    compute_dtype: str,
    optimizer: OptimizerConfig,
    total_steps: int,
) -> WorkerRequest:
    """The learner's ranks, placed together.  objective: None is supervised fine-tuning."""
    config = context.config
    pool: PoolConfig = config.pools.learner
    shared = {
        "world_size": pool.count,
        "source": source,
        "objective": objective,
        "optimizer": optimizer,
        # The precision of fine-tuning is set apart from that of distillation.
        "config": config.learner.model_copy(update={"compute_dtype": compute_dtype}),
        "total_steps": total_steps,
        "max_response_tokens": config.rollout.sampling.max_response_tokens,
        # By name, so that teacher and student do not start from the same random weights.
        "seed": derive_seed(config.seed, name, "weights"),
        "uses_gpu": pool.gpus > 0,
        "timeout_seconds": config.deadlines.call_seconds,
        "staleness": config.distill.staleness,
        # Fine-tuning has no engines to follow it.
        "wire": AS_THEY_ARE if objective is None else wire_format(config),
    }
    return WorkerRequest(
        name=name,
        worker_class=Learner,
        arguments=[{"rank": rank, **shared} for rank in range(pool.count)],
        pool=pool,
        environment={**torch_environment(config, pool, config.learner.threads), **_logs(context)},
        gang=True,
    )


def _logs(context: RunContext) -> dict[str, str]:
    """By what a worker knows where its log is."""
    own = context.config.logging
    return log_environment(context.run.logs_directory, level=own.level, json_lines=own.json_lines)


def wire_format(config: RunConfig) -> WireFormat:
    """The precision in which the student's engines get its weights: their own."""
    dtype, stochastic = config.rollout.student_engine.dtype, config.rounding == "stochastic"
    seed = derive_seed(config.seed, "weights", "rounding") if stochastic else None
    return WireFormat(dtype=getattr(torch, dtype), seed=seed)


def transfer_backend(context: RunContext) -> str:
    """The backend that sends weights from the learner to the student's engines."""
    return context.config.transfer_backend
