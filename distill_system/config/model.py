"""Teacher and student: where a model comes from, its optimizer, and its supervised fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from distill_system.config.base import ConfigModel


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


class OptimizerConfig(ConfigModel):
    """Optimizer, schedule (linear warm-up, then cosine) and clipping."""

    type: Literal["adamw", "muon"] = "adamw"
    """adamw for all parameters, or torch's Muon for the hidden matrices and AdamW for the rest."""
    learning_rate: PositiveFloat
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 20
    """Steps of linear warm-up."""
    final_learning_rate_fraction: NonNegativeFloat = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of matrices."""
    adam_betas: tuple[MomentDecay, MomentDecay] = (0.9, 0.98)
    """AdamW's moment decay rates."""
    max_gradient_norm: PositiveFloat = 1.0
    """Gradients of larger global norm are scaled down to it."""


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

    path: str | None = None
    """Folder or hub name of a pretrained model."""
    architecture: ArchitectureConfig | None = None
    """Shape of a model to start from random weights; needs sft."""
    sft: SupervisedConfig | None = None
    """Supervised fine-tuning before distillation; null uses the model as it is."""
    trust_remote_code: bool = False
    """Run code that a model folder carries; off unless you asked for it by name."""

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
    vocabulary_chunk_tokens: PositiveInt = 512
    """Tokens whose vocabulary-sized rows exist at once; memory is this x vocabulary x 4 bytes."""
    threads: PositiveInt = Field(default=1)
    """CPU threads of each rank."""
