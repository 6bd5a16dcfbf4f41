"""The distillation objectives, a union on `type`; one model per file of objectives/."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from distill_system.config.base import ConfigModel


class ClosedFormCritic(ConfigModel):
    """The exact best response of the bilinear critic class, made anew each step."""

    type: Literal["closed_form"] = "closed_form"
    ball: Literal["spectral", "frobenius"] = "spectral"
    """Norm that bounds the critic's matrix; spectral is the tight one for unit features."""
    radius: PositiveFloat = 1.0
    """C: the bound, |f| <= C for unit features."""


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


class AmmdConfig(ConfigModel):
    """Adversarial action-value moment matching (arXiv 2406.02959) on both streams."""

    type: Literal["ammd"] = "ammd"
    on_policy_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """beta: weight of the on-policy term; 1 - beta weighs the off-policy term."""
    critic: CriticConfig = ClosedFormCritic()
    """How the inner maximisation is played."""
    moment_target: Literal["expected", "sampled"] = "expected"
    """Both sides of the moment in expectation (less noise), or the token as written (the paper)."""
    policy_gradient: Literal["immediate", "reward_to_go", "immediate_plus_future"] = "immediate"
    """On-policy term: exact expectation of the immediate cost; the paper's REINFORCE with
    reward-to-go; or the immediate cost plus a score-function term of strictly future costs."""
    discount: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """gamma."""
    baseline: Literal["none", "batch", "position"] = "position"
    """What is subtracted from reward-to-go: nothing, its batch mean, or its mean per position."""
    future_weight: NonNegativeFloat = 0.3
    """Weight of the future term of immediate_plus_future."""
    normalise_future: bool = True
    """Divide the future costs by the number of later tokens (stable, biased); with false and
    future_weight 1 the gradient is exact in expectation."""
    language_model_weight: NonNegativeFloat = 0.0
    """Weight of an extra next-token loss on the off-policy stream."""


ObjectiveConfig = Annotated[AmmdConfig, Field()]
