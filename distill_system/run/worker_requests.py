"""The workers of a run, pool by pool: their arguments and environment, and the requests for them.

`distill-system generate` takes the arguments alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from distill_system.cluster import WorkerRequest
from distill_system.config import RunConfig
from distill_system.config.model import OptimizerConfig
from distill_system.config.objective import ObjectiveConfig
from distill_system.config.pools import PoolConfig
from distill_system.config.rollout import EngineConfig
from distill_system.learner import Learner, ModelSource
from distill_system.logs import log_environment
from distill_system.network import interface_environment
from distill_system.observe import EngineGauges
from distill_system.records import Author
from distill_system.rollout import RolloutWorker, engine_environment
from distill_system.run.context import RunContext
from distill_system.run.sample_origin import find_stored_targets
from distill_system.run.vocabulary import stop_token_ids, vocabulary_size
from distill_system.scoring import RankedScorer, TeacherScorer
from distill_system.seeds import derive_seed
from distill_system.weights import WireFormat
from distill_system.weights.rounding import AS_THEY_ARE


def rollout_pool(config: RunConfig, author: Author) -> PoolConfig:
    """The configuration of one model's pool of rollout workers."""
    pools = config.pools
    return pools.student_rollout if author is Author.STUDENT else pools.teacher_rollout


def rollout_arguments(
    config: RunConfig, tokenizer: Any, author: Author, path: str, pool: PoolConfig
) -> dict[str, Any]:
    """Arguments of a RolloutWorker that receives no weights, without `name`.

    path: folder or hub name of the model.  pool: the worker's; author's own, or `evaluation`.
    """
    return {
        "model_path": path,
        "author": author,
        "engine": _engine(config, author),
        "max_model_length": config.max_model_length,
        "uses_gpu": pool.gpus > 0,
        "tensor_parallel_size": tensor_parallel_size(pool),
        "trust_remote_code": getattr(config, author).trust_remote_code,
        "vocabulary_size": vocabulary_size(tokenizer),
        "stop_token_ids": stop_token_ids(config, tokenizer),
        "keep_stale_cache": config.rollout.keep_stale_cache,
        "library": config.rollout.engine,
    }


def rollout_environment(config: RunConfig, author: Author, pool: PoolConfig) -> dict[str, str]:
    """Environment variables of a RolloutWorker of this pool."""
    own = engine_environment(uses_gpu=pool.gpus > 0, threads=_engine(config, author).threads)
    return {**own, **_shared_environment(config)}


def scorer_arguments(config: RunConfig, tokenizer: Any, path: str) -> dict[str, Any]:
    """Arguments of a TeacherScorer.  path: folder or hub name of the teacher."""
    pool = config.pools.teacher_scoring
    return {
        "model_path": path,
        "config": config.scoring,
        "vocabulary_chunk_tokens": config.learner.chunk_tokens(on_gpu=pool.gpus > 0),
        "uses_gpu": pool.gpus > 0,
        "shares_gpu": pool.colocate_with is not None and 0.0 < pool.gpus < 1.0,
        "vocabulary_size": vocabulary_size(tokenizer),
        "action_dimension": config.distill.action_dimension,
        "trust_remote_code": config.teacher.trust_remote_code,
    }


def torch_environment(config: RunConfig, pool: PoolConfig, threads: int) -> Mapping[str, str]:
    """Environment variables of a worker that computes with torch and has no vLLM engine."""
    if pool.gpus > 0:
        return _shared_environment(config)
    return {
        **_shared_environment(config),
        "OMP_NUM_THREADS": str(threads),
        # By default idle OpenMP threads spin, which takes cores from the other workers.
        "OMP_WAIT_POLICY": "PASSIVE",
        # oneDNN caches compiled code for each tensor shape, and nearly every batch has a new one.
        # Its default of 1,024 entries took over 2 GB for a bfloat16 model of 5 million parameters.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    }


def _shared_environment(config: RunConfig) -> dict[str, str]:
    """What every worker gets: the network interface, and whether there is a hub to be asked."""
    offline = "HF_HUB_OFFLINE"  # a worker elsewhere must not ask a hub that this process cannot
    hub = {offline: os.environ[offline]} if offline in os.environ else {}
    return {**hub, **interface_environment(config.cluster.network_interface)}


def tensor_parallel_size(pool: PoolConfig) -> int:
    """GPUs that share one worker's model; 1 without a GPU."""
    return max(1, int(pool.gpus))


def _engine(config: RunConfig, author: Author) -> EngineConfig:
    engine: EngineConfig = getattr(config.rollout, f"{author}_engine")
    return engine


def rollout_request(context: RunContext, name: str, author: Author, path: str) -> WorkerRequest:
    """A pool of rollout workers of the model in `path`; only the student's workers receive weights.

    name: student_rollout, teacher_rollout or evaluation.
    """
    config = context.config
    backend = config.transfer_backend if author is Author.STUDENT else None
    by_itself = _rollout(
        config, context.tokenizer, name, author, path, weight_transfer_backend=backend
    )
    return _of_a_run(context, by_itself)


def evaluation_request(config: RunConfig, tokenizer: Any, path: str) -> WorkerRequest:
    """The workers that generate for evaluations, of the model in `path`, which stays as it is."""
    name = "student_rollout" if config.pools.evaluation is None else "evaluation"
    return _rollout(config, tokenizer, name, Author.STUDENT, path)


def scoring_request(context: RunContext) -> WorkerRequest:
    """The pool of teacher scorers."""
    config, ranks = context.config, context.config.scoring.shard_ranks
    # Targets that a scorer looks up instead of computing them.
    own: dict[str, Any] = {"known_targets": find_stored_targets(context)}
    if ranks > 1:
        own |= {"num_ranks": ranks, "timeout_seconds": config.deadlines.call_seconds}
    plain = reading_request(config, context.tokenizer, context.teacher_path)
    arguments = [{**each, **own} for each in plain.arguments]
    kind = TeacherScorer if ranks == 1 else RankedScorer
    return _of_a_run(context, replace(plain, worker_class=kind, arguments=arguments, ranks=ranks))


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


def _rollout(
    config: RunConfig, tokenizer: Any, name: str, author: Author, path: str, **own: Any
) -> WorkerRequest:
    pool = config.pools.by_name[name]
    gauges = EngineGauges(run=config.name, pool=name)
    shared = {**rollout_arguments(config, tokenizer, author, path, pool), **own}
    return WorkerRequest(
        name=name,
        worker_class=RolloutWorker,
        arguments=[
            {"name": f"{name}-{index}", **shared, "load_report": gauges}
            for index in range(pool.count)
        ],
        pool=pool,
        environment=rollout_environment(config, author, pool),
    )


def _of_a_run(context: RunContext, request: WorkerRequest) -> WorkerRequest:
    """The request with what the run's own folder and other pools add to it."""
    environment = {**request.environment, **_logs(context)}
    return replace(request, environment=environment, colocate_with=request.pool.colocate_with)


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
        "language_model_weight": _language_model_weight(config, objective),
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


def _language_model_weight(config: RunConfig, objective: ObjectiveConfig | None) -> float:
    own = config.distill.language_model
    return 0.0 if own is None or objective is None else own.weight


def _logs(context: RunContext) -> dict[str, str]:
    """By what a worker knows where its log is."""
    own = context.config.logging
    return log_environment(context.run.logs_directory, level=own.level, json_lines=own.json_lines)


def wire_format(config: RunConfig) -> WireFormat:
    """The precision in which the student's engines get its weights: their own."""
    dtype, stochastic = config.rollout.student_engine.dtype, config.rounding == "stochastic"
    seed = derive_seed(config.seed, "weights", "rounding") if stochastic else None
    return WireFormat(dtype=getattr(torch, dtype), seed=seed)
