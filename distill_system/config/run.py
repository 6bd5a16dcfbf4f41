"""One run: everything `distill-system train` reads, in one frozen model."""

from __future__ import annotations

import re
from typing import Annotated, Literal

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
from distill_system.config.data import DataConfig, PretrainedTokenizer, TokenizerConfig
from distill_system.config.model import (
    FullUpdate,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    UpdateConfig,
)
from distill_system.config.objective import (
    AmmdConfig,
    MinillmConfig,
    ObjectiveConfig,
    StreamName,
)

MetricName = Literal["exact_match", "rouge_l", "rouge_l_stemmed", "bleu", "accuracy"]


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
    enable_prefix_caching: bool = False
    """Share the cache of common prompt prefixes. Off, so that a run repeats to the bit."""


class RolloutConfig(ConfigModel):
    """Student and teacher rollouts."""

    sampling: SamplingConfig
    student_engine: EngineConfig = EngineConfig()
    teacher_engine: EngineConfig = EngineConfig()


class ScoringConfig(ConfigModel):
    """Teacher scoring."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the teacher's forward pass. bfloat16 ships its features as float16."""
    max_tokens_per_batch: PositiveInt = 8192
    """Most tokens of one forward pass, prompts included; sequences are packed, not padded."""
    threads: PositiveInt = 1
    """CPU threads of each scorer."""


class PoolConfig(ConfigModel):
    """One pool of workers and what each of its workers asks of the cluster."""

    count: PositiveInt = 1
    """Number of workers."""
    cpus: NonNegativeFloat = 1.0
    """CPUs per worker."""
    gpus: NonNegativeFloat = 0.0
    """GPUs per worker; more than one in a rollout pool is tensor parallelism."""
    custom_resources: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Ray custom resources per worker."""


class PoolsConfig(ConfigModel):
    """Each kind of worker is counted and placed by itself."""

    student_rollout: PoolConfig = PoolConfig()
    teacher_rollout: PoolConfig = PoolConfig()
    teacher_scoring: PoolConfig = PoolConfig()
    learner: PoolConfig = PoolConfig()

    @model_validator(mode="after")
    def _check(self) -> PoolsConfig:
        if (self.learner.gpus > 0) != (self.student_rollout.gpus > 0):
            raise ValueError(
                "learner and student_rollout must both have GPUs or both have none: weights travel "
                f"over NCCL or over gloo, got learner.gpus={self.learner.gpus} and "
                f"student_rollout.gpus={self.student_rollout.gpus}"
            )
        if self.learner.gpus not in (0.0, 1.0):
            raise ValueError(f"a learner rank has 0 or 1 GPU, got learner.gpus={self.learner.gpus}")
        return self


class ReplayConfig(ConfigModel):
    """DistiLLM's adaptive schedule (arXiv 2402.03898): each step learns from rows of data or from
    the student's text; the student's share grows as the held-out loss rises, and its text is used
    again."""

    capacity: PositiveInt = 1000
    """Student trajectories kept, the oldest leave first."""
    initial_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Chance of a step on the student's text, at the beginning."""
    increase: PositiveFloat = 0.1
    """What a rise of the held-out loss adds to that chance."""
    tolerance: NonNegativeFloat = 0.1
    """A rise by no more than this counts as none, in nats per token."""


class BestConfig(ConfigModel):
    """Which checkpoints stay beside the newest ones: the best by a metric of held-out data."""

    metric: Annotated[str, Field(pattern=r"^(held_out|evaluation)/.+$")]
    """Name of the metric, as in docs/metrics.md; a checkpoint counts with what was last measured
    before it."""
    mode: Literal["min", "max"]
    """Whether less is better, or more."""
    count: PositiveInt = 1
    """How many stay."""


class DistillConfig(ConfigModel):
    """The distillation: objective, streams, optimizer, and when it is looked at."""

    steps: PositiveInt
    """Learner steps."""
    student_prompts_per_step: NonNegativeInt = 32
    """Prompts the student answers in each step (the on-policy stream). A stream that the objective
    does not read leaves its sequences to the other, so that objectives compare at equal batches."""
    teacher_prompts_per_step: NonNegativeInt = 32
    """Sequences of the off-policy stream in each step: prompts the teacher answers, or rows."""
    off_policy_source: Literal["teacher", "dataset"] = "teacher"
    """Who writes the off-policy stream: the teacher as the run goes on, or the rows of
    data.student_sft."""
    replay: ReplayConfig | None = None
    """Learn from one stream a step, and from the student's earlier text again; null learns from
    every stream in every step."""
    objective: ObjectiveConfig = AmmdConfig()
    """What the student learns to match, and on which of the two streams."""
    update: UpdateConfig = FullUpdate()
    """What of the student learns: all of it, or adapters."""
    action_dimension: PositiveInt | None = 256
    """Most dimensions in which critics see an action: wider action embeddings are read in a fixed
    random subspace, a smaller class of critics at less cost in products, memory and bytes on the
    wire; null takes them whole. Holds for the game and for the measured distances."""
    optimizer: OptimizerConfig
    measure_every: PositiveInt = 25
    """Steps between measurements of both distances on data.held_out."""
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations during training, a multiple of measure_every; null evaluates
    before and after alone."""
    checkpoint_every: PositiveInt = 100
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that stay on disk."""
    keep_best: BestConfig | None = None
    """Checkpoints that stay beside them; null keeps the newest alone."""

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if self.evaluate_every is not None and self.evaluate_every % self.measure_every:
            raise ValueError(
                "evaluate_every must be a multiple of measure_every, got "
                f"{self.evaluate_every} and {self.measure_every}"
            )
        for stream in ("on_policy", "off_policy"):
            if self.objective.reads(stream) and self.sequences(stream) == 0:
                raise ValueError(
                    f"objective.type={self.objective.type} reads the {stream} stream: expected "
                    f"{'student' if stream == 'on_policy' else 'teacher'}_prompts_per_step > 0, "
                    "got 0"
                )
        if isinstance(self.objective, MinillmConfig) and self.off_policy_source == "dataset":
            mixture = self.objective.teacher_mixture
            if mixture > 0:
                raise ValueError(
                    "objective.teacher_mixture mixes in text that the teacher wrote: expected "
                    "off_policy_source=teacher or teacher_mixture=0, got "
                    f"off_policy_source=dataset and teacher_mixture={mixture}"
                )
        both = self.objective.reads("on_policy") and self.objective.reads("off_policy")
        if self.replay is not None and not (both and self.off_policy_source == "dataset"):
            raise ValueError(
                "replay chooses between rows of data and the student's text: expected an objective "
                "that reads both streams and off_policy_source=dataset, got "
                f"objective.type={self.objective.type}, off_policy_source={self.off_policy_source}"
            )
        return self

    def sequences(self, stream: StreamName) -> int:
        """Sequences of a stream in each step; one that is not read leaves its own to the other."""
        own = {
            "on_policy": self.student_prompts_per_step,
            "off_policy": self.teacher_prompts_per_step,
        }
        if not self.objective.reads(stream):
            return 0
        alone = not (self.objective.reads("on_policy") and self.objective.reads("off_policy"))
        return sum(own.values()) if alone or self.replay is not None else own[stream]


class EvaluationConfig(ConfigModel):
    """How generations are scored."""

    metrics: tuple[MetricName, ...] = ("exact_match", "rouge_l")
    """Scores of every split, for greedy and for sampled generations."""
    num_examples_during: PositiveInt = 100
    """Examples per split of an evaluation during training; before and after use all."""
    num_shown: NonNegativeInt = 6
    """Generations per split that the report shows side by side."""


class DeadlinesConfig(ConfigModel):
    """Longest waits, in seconds; each ends the run with what was waited for."""

    resources_seconds: PositiveFloat = 300.0
    """For the cluster to place the workers."""
    start_seconds: PositiveFloat = 600.0
    """For a worker to load its model."""
    call_seconds: PositiveFloat = 1800.0
    """For one call of a worker: a step, a batch of rollouts, a batch of scores."""
    publish_seconds: PositiveFloat = 300.0
    """For one weight version to reach every rollout worker."""


class ClusterConfig(ConfigModel):
    """The Ray cluster: the one of RAY_ADDRESS is joined, or a local one is started."""

    dashboard: bool = True
    """Start the Ray dashboard of a local cluster, on localhost."""


class RunConfig(ConfigModel):
    """A whole run: data, two models, rollouts, scoring, learning, evaluation."""

    name: str
    """The run lives in runs_directory/name."""
    runs_directory: str = "runs"
    """Folder of all runs."""
    seed: NonNegativeInt = 0
    """Every random choice of the run derives from it."""
    tokenizer: TokenizerConfig = PretrainedTokenizer()
    """The one tokenizer of teacher and student."""
    data: DataConfig
    teacher: ModelConfig
    student: ModelConfig
    rollout: RolloutConfig
    scoring: ScoringConfig = ScoringConfig()
    learner: LearnerConfig = LearnerConfig()
    distill: DistillConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    pools: PoolsConfig = PoolsConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"name must be letters, digits, '.', '_' and '-', got {name!r}")
        return name

    @model_validator(mode="after")
    def _check_ranks(self) -> RunConfig:
        ranks, distill = self.pools.learner.count, self.distill
        for stream in ("on_policy", "off_policy"):
            count = distill.sequences(stream)
            if 0 < count < ranks:
                raise ValueError(
                    f"each step's {stream} stream must have at least pools.learner.count={ranks} "
                    f"sequences, so that every rank has a share, got {count}"
                )
        for role in ("teacher", "student"):
            sft = getattr(self, role).sft
            if sft is not None and sft.batch_size < ranks:
                raise ValueError(
                    f"{role}.sft.batch_size must be at least pools.learner.count={ranks}, so that "
                    f"every rank has a share, got {sft.batch_size}"
                )
        return self

    @model_validator(mode="after")
    def _check_shards(self) -> RunConfig:
        ranks, share = self.pools.learner.count, self.learner.shard_ranks
        if ranks % self.learner.shard_size(ranks):
            raise ValueError(
                "learner.shard_ranks ranks share one copy of the model: expected a divisor of "
                f'pools.learner.count={ranks} or "all", got {share}'
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        for role in ("teacher", "student"):
            model: ModelConfig = getattr(self, role)
            if model.sft is not None and getattr(self.data, f"{role}_sft") is None:
                raise ValueError(f"{role}.sft needs rows: give data.{role}_sft")
            if model.architecture is not None:
                longest = self.data.max_prompt_tokens + self.rollout.sampling.max_response_tokens
                if longest > model.architecture.max_position_embeddings:
                    raise ValueError(
                        f"{role}.architecture.max_position_embeddings must be at least "
                        "data.max_prompt_tokens + rollout.sampling.max_response_tokens = "
                        f"{longest}, got {model.architecture.max_position_embeddings}"
                    )
        if self.distill.off_policy_source == "dataset" and self.data.student_sft is None:
            raise ValueError("distill.off_policy_source=dataset needs rows: give data.student_sft")
        pretrained = isinstance(self.tokenizer, PretrainedTokenizer) and self.tokenizer.path is None
        if pretrained and self.teacher.path is None:
            raise ValueError(
                "the teacher starts from random weights and has no tokenizer of its own: "
                "give tokenizer.type=embedded or train_bpe, or tokenizer.path"
            )
        if isinstance(self.tokenizer, PretrainedTokenizer):
            return self
        for role in ("teacher", "student"):
            if getattr(self, role).path is not None:
                raise ValueError(
                    f"{role}.path is a pretrained model, whose vocabulary a tokenizer of "
                    f"type {self.tokenizer.type} cannot match: use tokenizer.type=pretrained"
                )
        return self
