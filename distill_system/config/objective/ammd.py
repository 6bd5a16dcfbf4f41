"""Adversarial moment matching: its critics, what they see, and how it is played."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from distill_system.config.base import ConfigModel
from distill_system.config.objective.needs import (
    MOMENTS,
    StreamName,
    TeacherNeeds,
    WeighsStreams,
)


class ClosedFormCritic(ConfigModel):
    """The exact best response of the bilinear critic class, made anew each step."""

    type: Literal["closed_form"] = "closed_form"
    ball: Literal["spectral", "frobenius"] = "spectral"
    """Norm that bounds the critic's matrix; spectral is the tight one for unit features."""
    radius: PositiveFloat = 1.0
    """C: the bound, |f| <= C for unit features."""
    average: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the past in a moving average of the moments that the critic answers; 0 answers this
    step alone. An averaged critic lags behind the student: 0.9 diverged in trials."""


class GradientCritic(ConfigModel):
    """K projected ascent steps per learner step, the paper's form."""

    type: Literal["gradient_ascent"]
    ball: Literal["spectral", "frobenius"] = "frobenius"
    """Norm that bounds the critic's matrix."""
    radius: PositiveFloat = 1.0
    """C: the bound."""
    steps: PositiveInt = 5
    """K: ascent steps per learner step."""
    step_size: PositiveFloat = 0.5
    """Length of one ascent step, in units of the radius."""
    keep: bool = True
    """Start from the last step's critic (the paper); false starts from zero each step."""


CriticConfig = Annotated[ClosedFormCritic | GradientCritic, Field(discriminator="type")]


class UnitFeatures(ConfigModel):
    """Hidden states divided by their length."""

    type: Literal["unit"] = "unit"


class WhitenedFeatures(ConfigModel):
    """Hidden states whose directions have been made equally large, then divided by their length."""

    type: Literal["whitened"]
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Share of the past in the moving average of the second moment; 0 uses this step's alone."""
    regularisation: PositiveFloat = 1e-2
    """Added to every eigenvalue of the second moment, in units of their mean."""


class ProjectedFeatures(ConfigModel):
    """Hidden states in fewer random dimensions, then divided by their length."""

    type: Literal["projected"]
    dimension: PositiveInt
    """r: the size of the features."""
    seed: int = 0
    """Draws the projection, the same for the whole run."""


FeaturesConfig = Annotated[
    UnitFeatures | WhitenedFeatures | ProjectedFeatures, Field(discriminator="type")
]


class AdvantageConfig(ConfigModel):
    """One more action feature for the critics, made of the teacher's log-probabilities."""

    type: Literal["none", "soft_advantage", "log_ratio"] = "none"
    """none; log pi* with the sign that each state's gap calls for; or log pi* - log pi_theta."""
    weight: PositiveFloat = 1.0
    """Bound of the feature's part of the critic, as the radius is of the other part."""
    clip: PositiveFloat = 6.0
    """Nats at which the feature is clipped, and by which it is divided."""
    streams: tuple[StreamName, ...] = ("off_policy", "on_policy")
    """The streams whose critic has it."""

    @model_validator(mode="after")
    def _check(self) -> AdvantageConfig:
        if not self.streams or len(set(self.streams)) != len(self.streams):
            raise ValueError(
                f"streams must name off_policy, on_policy or both once, got {list(self.streams)}; "
                "type=none switches the feature off"
            )
        return self


class AmmdConfig(WeighsStreams):
    """Adversarial action-value moment matching (arXiv 2406.02959) on both streams."""

    type: Literal["ammd"] = "ammd"
    critic: CriticConfig = ClosedFormCritic()
    """How the inner maximisation is played."""
    features: FeaturesConfig = UnitFeatures()
    """What the critics see of a state."""
    advantage: AdvantageConfig = AdvantageConfig()
    """The widened critic class: one more action feature."""
    moment_target: Literal["expected", "sampled"] = "expected"
    """Both sides of the moment in expectation (less noise), or the token as written (the paper)."""
    policy_gradient: Literal["immediate", "reward_to_go", "immediate_plus_future"] = "immediate"
    """On-policy term: exact expectation of the immediate cost; the paper's REINFORCE with
    reward-to-go; or the immediate cost plus a score-function term of strictly future costs."""
    discount: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """gamma."""
    baseline: Literal["none", "batch", "position", "leave_one_out"] = "position"
    """What is subtracted from reward-to-go: nothing, its batch mean, its mean per position, or its
    mean per position over the other responses (unbiased)."""
    future_weight: NonNegativeFloat = 0.3
    """Weight of the future term of immediate_plus_future."""
    normalise_future: bool = True
    """Divide the future costs by the number of later tokens (stable, biased); with false and
    future_weight 1 the gradient is exact in expectation."""
    language_model_weight: NonNegativeFloat = 0.0
    """Weight of an extra next-token loss on the off-policy stream."""

    @model_validator(mode="after")
    def _check_language_model(self) -> AmmdConfig:
        if self.language_model_weight > 0 and not self.reads("off_policy"):
            raise ValueError(
                f"language_model_weight={self.language_model_weight} is a loss on the off-policy "
                f"stream, which on_policy_weight={self.on_policy_weight} leaves out: expected "
                "language_model_weight=0 or on_policy_weight below 1"
            )
        return self

    def has_loss(self, stream: StreamName) -> bool:
        """On both."""
        return True

    def teacher_needs(self, stream: StreamName) -> TeacherNeeds:
        """Final hidden states and expected embeddings of both streams."""
        return MOMENTS

    @property
    def needs_teacher_distribution(self) -> bool:
        """Whether the learner rebuilds the teacher's whole distribution."""
        return self.advantage.type != "none"
