"""Configuration of rollouts and of the teacher's scoring: sampling, engines, batching."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from distill_system.config.base import ConfigModel

EngineName = Literal["vllm", "transformers"]
"""The library that generates."""


class SamplingConfig(ConfigModel):
    """How rollouts are sampled."""

    temperature: Annotated[float, Field(ge=0.01, le=100.0)] = 1.0
    """Sampling temperature of student and teacher rollouts. Below 0.01 vLLM takes 0.01, above 100
    tokens are drawn evenly."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus truncation; 1 samples from the full distribution."""
    max_response_tokens: PositiveInt
    """A response is cut at this length."""


class EngineConfig(ConfigModel):
    """The engine of a rollout worker."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of weights and computation."""
    max_num_sequences: PositiveInt = 256
    """Sequences decoded at once."""
    kv_cache_mebibytes: PositiveInt | None = None
    """Memory of the key-value cache; null takes 256 on a CPU, gpu_memory_utilization on a GPU."""
    threads: PositiveInt = 1
    """CPU threads of each worker without a GPU."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of the device that vLLM may take where kv_cache_mebibytes is null."""
    enforce_eager: bool = False
    """No CUDA graphs and no compilation: a faster start, slower decoding on a GPU."""
    sleep_when_idle: bool = False
    """Free the GPU's memory while the engine is idle: weights move to CPU memory, the cache is
    dropped, and waking takes the time to copy the weights back. For a teacher that shares its GPU
    with a scorer."""
    enable_prefix_caching: bool = False
    """Share the cache of common prompt prefixes. Off by default, so that runs are reproducible bit
    for bit."""


class RolloutConfig(ConfigModel):
    """Student and teacher rollouts."""

    engine: EngineName = "vllm"
    """The library that generates, for student and teacher. transformers runs wherever torch does,
    without vLLM, generates with encoder-decoders too, and may share the learner's GPU."""
    sampling: SamplingConfig
    student_engine: EngineConfig = EngineConfig()
    teacher_engine: EngineConfig = EngineConfig()
    slice_seconds: PositiveFloat = 0.05
    """Duration of a decode slice: an engine decodes for this long, then returns what is finished
    and takes new prompts; twice as long if nothing finished. With max_staleness 0 there are no
    slices: an engine decodes a step's prompts to their ends."""
    keep_stale_cache: bool = False
    """Continue a sequence under new weights with the key-value cache of the old ones: nothing is
    computed again, but the recorded log-probabilities are then those of no single model."""
    weight_rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How the learner's float32 weights become those of a bfloat16 student engine. stochastic: up
    or down at random, so that each is right on average and engines follow updates that are smaller
    than the distance of two bfloat16 numbers; a learner that computes in bfloat16 reads the same
    numbers. nearest: such updates are lost until they add up."""
    max_logprob_gap: PositiveFloat | None = None
    """A run ends if the log-probabilities of engines and learner, for the same tokens and weights,
    differ by more than this on average, in nats: in a step, or on held-out prompts. null: it only
    warns, from 0.1 in float32; in lower precision from 0.5, or where the gap has tripled."""


class ScoringConfig(ConfigModel):
    """Teacher scoring."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the teacher's forward pass. With bfloat16 its features are sent as float16."""
    max_tokens_per_batch: PositiveInt = 8192
    """Most tokens of one forward pass, prompts included; sequences are packed, not padded."""
    max_wait_seconds: NonNegativeFloat = 0.1
    """Longest time that a finished sequence waits for others to be scored with it while a scorer is
    free. With max_staleness 0 all sequences of a step are scored together."""
    threads: PositiveInt = 1
    """CPU threads of each scorer, or of each of its ranks."""
    shard_ranks: PositiveInt = 1
    """Ranks that make up one scorer: they share one copy of the teacher, each holding a part, and
    each reads a share of the text. Each has the pool's cpus and gpus to itself. For a teacher that
    does not fit one GPU."""
