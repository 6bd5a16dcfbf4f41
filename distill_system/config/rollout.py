"""How sequences are written and read: sampling, engines, scorers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from distill_system.config.base import ConfigModel


class SamplingConfig(ConfigModel):
    """How rollouts are sampled."""

    temperature: PositiveFloat = 1.0
    """Sampling temperature of student and teacher rollouts."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus truncation; 1 samples from the full distribution."""
    max_response_tokens: PositiveInt
    """A response is cut at this length."""


class EngineConfig(ConfigModel):
    """The vLLM engine of a rollout worker."""

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
    """Give the GPU's memory free while the engine has nothing to write: weights wait in CPU memory,
    the cache is dropped. For a teacher on a GPU that it shares with a scorer; it takes the time of
    a copy of the weights to wake."""
    enable_prefix_caching: bool = False
    """Share the cache of common prompt prefixes. Off, so that a run repeats to the bit."""


class RolloutConfig(ConfigModel):
    """Student and teacher rollouts."""

    sampling: SamplingConfig
    student_engine: EngineConfig = EngineConfig()
    teacher_engine: EngineConfig = EngineConfig()
    slice_seconds: PositiveFloat = 0.05
    """An engine decodes for so long before it hands out what is finished and takes what is new, and
    twice as long if nothing is; where max_staleness is 0 it decodes a step's prompts to their
    ends."""
    keep_stale_cache: bool = False
    """Let a sequence go on under new weights from the key-value cache of the old ones: nothing is
    read again, and the recorded log-probabilities are no longer those of any one model."""
    max_logprob_gap: PositiveFloat | None = None
    """Mean difference, in nats, between what engines and learner say of the same tokens under the
    same weights above which a run ends; null warns at 0.1 in float32 and 0.5 below."""


class ScoringConfig(ConfigModel):
    """Teacher scoring."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the teacher's forward pass. bfloat16 ships its features as float16."""
    max_tokens_per_batch: PositiveInt = 8192
    """Most tokens of one forward pass, prompts included; sequences are packed, not padded."""
    max_wait_seconds: NonNegativeFloat = 0.1
    """A finished sequence waits at most this long for others to be read with it, while a scorer is
    free; where max_staleness is 0 a step's sequences are read together."""
    threads: PositiveInt = 1
    """CPU threads of each scorer."""
