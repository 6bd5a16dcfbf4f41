"""A token loss on either stream or on both, and terms that look at hidden states."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from distill_system.config.base import ConfigModel
from distill_system.config.objective.needs import (
    DISTRIBUTION,
    NOTHING,
    StreamName,
    TeacherNeeds,
    WeighsStreams,
)
from distill_system.config.objective.token_losses import TokenLossConfig


class HiddenMatchingConfig(ConfigModel):
    """The student's hidden states, linearly mapped, match the teacher's (after LEADER)."""

    type: Literal["hidden_matching"]
    weight: PositiveFloat = 1.0
    """Times this, the term is added to the stream's loss."""
    distance: Literal["squared", "cosine"] = "squared"
    """Squared error over the mean squared length of the teacher's states, or 1 - cosine."""
    ridge: PositiveFloat = 1e-3
    """Penalty of the regression, in units of the mean squared hidden value."""
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Share of the past in the moving average of the covariances; 0 uses this step's alone."""


class RelationalConfig(ConfigModel):
    """Cosines between the hidden states of a response match the teacher's (after LLaVA-KD)."""

    type: Literal["relational"]
    weight: PositiveFloat = 1.0
    """Times this, the term is added to the stream's loss."""


STREAMS: tuple[StreamName, ...] = ("off_policy", "on_policy")

TermConfig = Annotated[HiddenMatchingConfig | RelationalConfig, Field(discriminator="type")]


class TokenMatchingConfig(WeighsStreams):
    """A loss between the two policies at each token, chosen for each stream by itself."""

    type: Literal["token_matching"]
    off_policy: TokenLossConfig | None = None
    """Loss on the off-policy stream; null leaves the stream out."""
    on_policy: TokenLossConfig | None = None
    """Loss on the on-policy stream; null leaves the stream out."""
    temperature: PositiveFloat = 1.0
    """Both policies' logits are divided by it before they are compared."""
    terms: tuple[TermConfig, ...] = ()
    """Added to the loss of every stream that is read; they look at hidden states."""

    @model_validator(mode="after")
    def _check_temperature(self) -> TokenMatchingConfig:
        for stream in STREAMS:
            loss = self.loss_on(stream)
            if loss is not None and loss.needs.top_k and self.temperature != 1.0:
                raise ValueError(
                    f"{stream}={loss.type} reads k of the teacher's probabilities, which cannot be "
                    f"brought to temperature={self.temperature}; set temperature to 1"
                )
        return self

    @model_validator(mode="after")
    def _check(self) -> TokenMatchingConfig:
        if self.off_policy is None and self.on_policy is None:
            raise ValueError("give off_policy, on_policy or both, got neither")
        given = [stream for stream in STREAMS if self.has_loss(stream)]
        if len(given) == 1 and self.weight(given[0]) == 0.0:
            raise ValueError(
                f"on_policy_weight={self.on_policy_weight} gives {given[0]} no weight, and "
                "there is no other loss"
            )
        return self

    def loss_on(self, stream: StreamName) -> TokenLossConfig | None:
        """The stream's token loss."""
        return self.on_policy if stream == "on_policy" else self.off_policy

    def has_loss(self, stream: StreamName) -> bool:
        """Whether its key gives one."""
        return self.loss_on(stream) is not None

    def teacher_needs(self, stream: StreamName) -> TeacherNeeds:
        """What the stream's token loss and the terms need."""
        loss = self.loss_on(stream)
        if loss is None:
            return NOTHING
        return loss.needs | DISTRIBUTION if self.terms else loss.needs

    @property
    def needs_teacher_distribution(self) -> bool:
        """Whether the learner rebuilds the teacher's whole distribution."""
        read = [self.loss_on(stream) for stream in STREAMS if self.reads(stream)]
        return any(loss.needs.features for loss in read if loss is not None)
