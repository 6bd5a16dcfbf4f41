"""Arguments and environment of a run's workers; used by runs and by `distill-system generate`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from distill_system.config import RunConfig
from distill_system.config.pools import PoolConfig
from distill_system.config.rollout import EngineConfig
from distill_system.network import interface_environment
from distill_system.records import Author
from distill_system.rollout import engine_environment
from distill_system.run.vocabulary import stop_token_ids, vocabulary_size


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
