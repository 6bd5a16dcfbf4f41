"""The distillation objectives, a union on `type`; one model per file of objectives/."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from distill_system.config.base import ConfigModel

StreamName = Literal["off_policy", "on_policy"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]


class TeacherNeeds(ConfigModel):
    """What an objective asks of the teacher at each token of a stream; a scorer makes no more."""

    features: bool = False
    """Final hidden states: from them the learner rebuilds the teacher's whole distribution."""
    expected_embedding: bool = False
    """sum_y pi*(y | s) e(y)."""
    logprobs: bool = False
    """log pi*(y_t | s_t) of the token written."""
    top_k: int = 0
    """The k most likely tokens and their log-probabilities."""

    def __or__(self, other: TeacherNeeds) -> TeacherNeeds:
        return TeacherNeeds(
            features=self.features or other.features,
            expected_embedding=self.expected_embedding or other.expected_embedding,
            logprobs=self.logprobs or other.logprobs,
            top_k=max(self.top_k, other.top_k),
        )

    @property
    def anything(self) -> bool:
        """Whether the teacher has to read the stream at all."""
        return self != NOTHING


NOTHING = TeacherNeeds()
DISTRIBUTION = TeacherNeeds(features=True)
MOMENTS = TeacherNeeds(features=True, expected_embedding=True)


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

    def reads(self, stream: StreamName) -> bool:
        """Whether the stream has weight."""
        return (self.on_policy_weight if stream == "on_policy" else 1 - self.on_policy_weight) > 0

    def teacher_needs(self, stream: StreamName) -> TeacherNeeds:
        """Final hidden states and expected embeddings of both streams."""
        return MOMENTS

    @property
    def needs_teacher_distribution(self) -> bool:
        """Whether the learner rebuilds the teacher's whole distribution."""
        return False


class CrossEntropyConfig(ConfigModel):
    """-log pi_theta of the token written: SFT on data, SeqKD on the teacher's text."""

    type: Literal["cross_entropy"]
    needs: ClassVar[TeacherNeeds] = NOTHING


class ForwardKlConfig(ConfigModel):
    """KL(teacher || student)."""

    type: Literal["forward_kl"]
    needs: ClassVar[TeacherNeeds] = DISTRIBUTION


class ReverseKlConfig(ConfigModel):
    """KL(student || teacher)."""

    type: Literal["reverse_kl"]
    needs: ClassVar[TeacherNeeds] = DISTRIBUTION


TokenLossConfig = Annotated[
    CrossEntropyConfig | ForwardKlConfig | ReverseKlConfig, Field(discriminator="type")
]


class TokenMatchingConfig(ConfigModel):
    """A loss between the two policies at each token, chosen for each stream by itself."""

    type: Literal["token_matching"]
    off_policy: TokenLossConfig | None = None
    """Loss on the off-policy stream; null leaves the stream out."""
    on_policy: TokenLossConfig | None = None
    """Loss on the on-policy stream; null leaves the stream out."""
    on_policy_weight: Share = 0.5
    """Weight of the on-policy loss where both streams are there; the off-policy one has the rest.
    A stream alone in a step has weight 1."""
    temperature: PositiveFloat = 1.0
    """Both policies' logits are divided by it before they are compared."""

    @model_validator(mode="after")
    def _check(self) -> TokenMatchingConfig:
        if self.off_policy is None and self.on_policy is None:
            raise ValueError("give off_policy, on_policy or both, got neither")
        alone = {0.0: "off_policy", 1.0: "on_policy"}.get(self.on_policy_weight)
        given = [name for name in ("off_policy", "on_policy") if getattr(self, name) is not None]
        if len(given) == 1 and alone not in (None, given[0]):
            raise ValueError(
                f"on_policy_weight={self.on_policy_weight} gives {given[0]} no weight, and "
                "there is no other loss"
            )
        return self

    def reads(self, stream: StreamName) -> bool:
        """Whether the stream has a loss."""
        return getattr(self, stream) is not None

    def teacher_needs(self, stream: StreamName) -> TeacherNeeds:
        """What the stream's token loss needs."""
        loss: TokenLossConfig | None = getattr(self, stream)
        return NOTHING if loss is None else loss.needs

    @property
    def needs_teacher_distribution(self) -> bool:
        """Whether the learner rebuilds the teacher's whole distribution."""
        losses = [loss for loss in (self.off_policy, self.on_policy) if loss is not None]
        return any(loss.needs.features for loss in losses)


ObjectiveConfig = Annotated[AmmdConfig | TokenMatchingConfig, Field(discriminator="type")]
