"""Configuration of models: their origin, fine-tuning and optimizer; how the learner computes."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from distill_system.config.base import ConfigModel, LocalPath


class ArchitectureConfig(ConfigModel):
    """A Llama-shaped model with random weights; its vocabulary is the tokenizer's."""

    hidden_size: PositiveInt
    """Width of the residual stream; a multiple of 2 x num_heads."""
    intermediate_size: PositiveInt
    """Width inside each MLP."""
    num_layers: PositiveInt
    """Transformer blocks."""
    num_heads: PositiveInt
    """Attention heads of each block."""
    max_position_embeddings: PositiveInt = 512
    """Longest sequence, prompt and response together."""
    tie_word_embeddings: bool = True
    """One matrix for input embeddings and unembedding."""

    @model_validator(mode="after")
    def _check(self) -> ArchitectureConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                "hidden_size must be a multiple of 2 x num_heads, "
                f"got {self.hidden_size} and {self.num_heads}"
            )
        return self


MomentDecay = Annotated[float, Field(ge=0.0, lt=1.0)]
USUAL_WARMUP_STEPS = 20
LONGEST_WARMUP = {"unasked": 0.25, "asked": 0.5}
"""Largest share of a run's steps that warm-up takes: a longer one would never reach the peak."""


class OptimizerConfig(ConfigModel):
    """Optimizer, schedule of the learning rate and clipping."""

    type: Literal["adamw", "muon"] = "adamw"
    """adamw for all parameters, or torch's Muon for the hidden matrices and AdamW for the rest."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up, at most half of all steps. null: 20, at most a quarter of them."""
    warmup_ratio: Annotated[float, Field(ge=0.0, le=0.5)] | None = None
    """Share of all steps that is warm-up, in place of warmup_steps."""
    schedule: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = "cosine"
    """How the learning rate goes on from the peak. cosine, linear: down to the final fraction, from
    the first step on, so that warm-up only delays it. constant: it stays at the peak.
    warmup_stable_decay: it stays there until the last decay_ratio of the steps, then linear."""
    decay_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of all steps in which warmup_stable_decay falls."""
    final_learning_rate_fraction: NonNegativeFloat = 0.1
    """Learning rate at the last step, as a fraction of the peak; constant does not read it."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of matrices."""
    adam_betas: tuple[MomentDecay, MomentDecay] = (0.9, 0.98)
    """AdamW's moment decay rates."""
    max_gradient_norm: PositiveFloat = 1.0
    """Gradients of larger global norm are scaled down to it."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError(
                "expected warmup_steps or warmup_ratio, got both: "
                f"{self.warmup_steps} and {self.warmup_ratio}"
            )
        return self

    def num_warmup_steps(self, total_steps: int) -> int:
        """Steps of warm-up in a run of total_steps."""
        if self.warmup_ratio is not None:
            return math.ceil(self.warmup_ratio * total_steps)
        if self.warmup_steps is None:
            return min(USUAL_WARMUP_STEPS, int(LONGEST_WARMUP["unasked"] * total_steps))
        return min(self.warmup_steps, int(LONGEST_WARMUP["asked"] * total_steps))


class FullUpdate(ConfigModel):
    """All weights of the student are trained."""

    type: Literal["full"] = "full"


class LoraUpdate(ConfigModel):
    """Low-rank adapters of the student's linear layers are trained, all else is frozen (LoRA,
    arXiv 2106.09685). Rollout workers receive, and the run exports, the merged weights."""

    type: Literal["lora"]
    rank: PositiveInt = 16
    """Rank r of each adapter: it adds alpha / r x B A to a layer's weight."""
    alpha: PositiveFloat = 32.0
    """Scale of the adapters, before it is divided by the rank."""
    target_modules: tuple[str, ...] | None = None
    """Linear layers that get an adapter, by the last part of their names, such as q_proj; null
    gives one to every linear layer of the student's blocks."""
    save_adapter: bool = False
    """Export the adapters by themselves too, in peft's format: `adapter/` in the student."""


UpdateConfig = Annotated[FullUpdate | LoraUpdate, Field(discriminator="type")]


class SupervisedConfig(ConfigModel):
    """Supervised fine-tuning: next-token loss on the responses of the data."""

    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Sequences per step over all ranks."""
    optimizer: OptimizerConfig
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward of the fine-tuning; weights stay float32."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints."""


class ModelConfig(ConfigModel):
    """One of the two models."""

    path: LocalPath | None = None
    """Folder or hub name of a pretrained model."""
    architecture: ArchitectureConfig | None = None
    """Shape of a model to start from random weights; needs sft."""
    sft: SupervisedConfig | None = None
    """Supervised fine-tuning before distillation; null uses the model as it is."""
    trust_remote_code: bool = False
    """Run Python code from the model's folder, which some models need; trust its author first."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of path (a pretrained model) and architecture")
        if self.path is None and self.sft is None:
            raise ValueError("a model of random weights needs sft; give sft, or a path instead")
        return self


class LearnerConfig(ConfigModel):
    """How the learner group computes."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the distillation's forward and backward; weights and sums stay float32."""
    vocabulary_chunk_tokens: PositiveInt | None = None
    """Tokens whose logits exist at once; their memory is this x vocabulary x 4 bytes, two to three
    times. null: 512 on a CPU, 4096 on a GPU."""
    threads: PositiveInt = Field(default=1)
    """CPU threads of each rank."""
    shard_ranks: PositiveInt | Literal["all"] = 1
    """Ranks that share one copy of parameters, gradients and optimizer state, each holding a part;
    pools.learner.count must be a multiple of it. 1 gives every rank a copy of its own."""
    max_tokens_per_microbatch: PositiveInt | None = None
    """Most tokens, prompts included, whose activations a rank holds at once; a longer sequence is a
    microbatch of its own. A step with more tokens is processed in microbatches, with two forward
    passes and the same gradient (gradient accumulation: the batch stays that of the step, whatever
    this key says). null: all tokens of a step at once."""
    activation_checkpointing: bool = False
    """Keep only the inputs of transformer blocks, and compute each block again in the backward
    pass: less memory for about a third more computation."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in CPU memory; a GPU holds one block at a
    time, and the optimizer runs on the CPU."""
    compile: bool = False
    """Compile each transformer block with torch.compile. For GPUs: a CPU needs a C++ compiler, and
    compiles anew for sequences of other lengths, for minutes."""

    def chunk_tokens(self, *, on_gpu: bool) -> int:
        """vocabulary_chunk_tokens, or what stands for null on the device."""
        if self.vocabulary_chunk_tokens is not None:
            return self.vocabulary_chunk_tokens
        return 4096 if on_gpu else 512

    def shard_size(self, num_ranks: int) -> int:
        """Ranks of a learner of num_ranks that share one copy of the model."""
        return num_ranks if self.shard_ranks == "all" else self.shard_ranks
