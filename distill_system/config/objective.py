"""The distillation objectives, a union on `type`; one model per file of objectives/."""

from __future__ import annotations

from typing import Annotated, Literal, Self

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


class AmmdConfig(ConfigModel):
    """Adversarial action-value moment matching (arXiv 2406.02959) on both streams."""

    type: Literal["ammd"] = "ammd"
    on_policy_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """beta: weight of the on-policy term; 1 - beta weighs the off-policy term."""
    critic: CriticConfig = ClosedFormCritic()
    """How the inner maximisation is played."""
    features: FeaturesConfig = UnitFeatures()
    """What the critics see of a state."""
    action_dimension: PositiveInt | None = None
    """Dimensions in which the critics see an action: a fixed random subspace of the action
    embeddings, a smaller class of critics at less cost; null takes the embeddings whole."""
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

    def reads(self, stream: StreamName) -> bool:
        """Whether the stream has weight."""
        return (self.on_policy_weight if stream == "on_policy" else 1 - self.on_policy_weight) > 0

    def teacher_needs(self, stream: StreamName) -> TeacherNeeds:
        """Final hidden states and expected embeddings of both streams."""
        return MOMENTS

    @property
    def needs_teacher_distribution(self) -> bool:
        """Whether the learner rebuilds the teacher's whole distribution."""
        return self.advantage.type != "none"


class MinillmConfig(ConfigModel):
    """Reverse KL of whole responses by policy gradient, MiniLLM (arXiv 2306.08543)."""

    type: Literal["minillm"]
    teacher_mixture: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """alpha: share of the responses that the teacher writes; 0 reads the student's own alone."""
    importance: Literal["token", "prefix"] = "token"
    """What a token is weighed by for having been sampled from the mixture: its own likelihood
    ratio (the paper's approximation), or that of all tokens up to it (exact)."""
    normalise_length: bool = True
    """Divide the future of a token by its length (stable, biased); false is exact."""
    language_model_weight: NonNegativeFloat = 0.0
    """Weight of an extra next-token loss on the off-policy stream."""

    def reads(self, stream: StreamName) -> bool:
        """The student's text always; the off-policy stream if it has a share or a loss."""
        extra = self.teacher_mixture > 0 or self.language_model_weight > 0
        return stream == "on_policy" or extra

    def teacher_needs(self, stream: StreamName) -> TeacherNeeds:
        """The whole distribution, and the log-probabilities of the tokens written."""
        if stream == "off_policy" and self.teacher_mixture == 0:
            return NOTHING
        return TeacherNeeds(features=True, logprobs=True)

    @property
    def needs_teacher_distribution(self) -> bool:
        """Whether the learner rebuilds the teacher's whole distribution."""
        return True


class TokenLossModel(ConfigModel):
    """What every loss between two policies at one token has."""

    @property
    def needs(self) -> TeacherNeeds:
        """What it asks of the teacher at each token."""
        return DISTRIBUTION

    @property
    def tokens_together(self) -> int:
        """Successive tokens whose losses depend on one another: they are read at one time."""
        return 1

    def at(self, progress: float) -> Self:
        """The settings in force once this share of the run, in (0, 1], is done."""
        return self


class CrossEntropyConfig(TokenLossModel):
    """-log pi_theta of the token written: SFT on data, SeqKD on the teacher's text."""

    type: Literal["cross_entropy"]

    @property
    def needs(self) -> TeacherNeeds:
        """Nothing: the text is enough."""
        return NOTHING


class InterpolatedCrossEntropyConfig(TokenLossModel):
    """Cross-entropy to a mixture of the token written and the teacher's distribution (PS-KD)."""

    type: Literal["interpolated_cross_entropy"]
    teacher_weight: Share = 0.8
    """w: the teacher's share of the target; the token written has the rest."""
    schedule: Literal["linear", "constant"] = "linear"
    """linear: w grows with the steps, from near 0 to teacher_weight at the last one."""

    def at(self, progress: float) -> Self:
        """The weight of this moment, which no longer grows."""
        share = progress if self.schedule == "linear" else 1.0
        now = {"teacher_weight": share * self.teacher_weight, "schedule": "constant"}
        return self.model_copy(update=now)


class ForwardKlConfig(TokenLossModel):
    """KL(teacher || student)."""

    type: Literal["forward_kl"]


class ReverseKlConfig(TokenLossModel):
    """KL(student || teacher)."""

    type: Literal["reverse_kl"]


class GeneralizedJsdConfig(TokenLossModel):
    """Generalised Jensen-Shannon divergence (GKD)."""

    type: Literal["generalized_jsd"]
    mixture_weight: OpenShare = 0.5
    """The teacher's share of the mixture: near 0 it is a small forward KL, near 1 reverse KL."""


class TotalVariationConfig(TokenLossModel):
    """Total variation distance (f-distill)."""

    type: Literal["total_variation"]


class SkewKlConfig(TokenLossModel):
    """KL(teacher || skew teacher + (1 - skew) student) (DistiLLM)."""

    type: Literal["skew_kl"]
    skew: OpenShare = 0.1
    """alpha: the teacher's share of the mixture."""


class SkewReverseKlConfig(TokenLossModel):
    """KL(student || (1 - skew) teacher + skew student) (DistiLLM)."""

    type: Literal["skew_reverse_kl"]
    skew: OpenShare = 0.1
    """alpha: the student's share of the mixture."""


class TopKConfig(TokenLossModel):
    """A divergence between the teacher's k most likely tokens and one bucket for all others."""

    type: Literal["top_k"]
    k: PositiveInt = 32
    """Tokens with a bucket of their own."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """How the k + 1 buckets are compared; jsd mixes both policies half and half."""

    @property
    def needs(self) -> TeacherNeeds:
        """The k tokens and their log-probabilities."""
        return TeacherNeeds(top_k=self.k)


class FirstConfig(TokenLossModel):
    """Cross-entropy to the teacher's renormalised, recalibrated top-k (FIRST)."""

    type: Literal["first"]
    k: PositiveInt = 5
    """Tokens that the target is made of."""
    recalibration_temperature: PositiveFloat = 1.0
    """The k log-probabilities are divided by it before they are renormalised."""

    @property
    def needs(self) -> TeacherNeeds:
        """The k tokens and their log-probabilities."""
        return TeacherNeeds(top_k=self.k)


class SinkhornConfig(TokenLossModel):
    """Sinkhorn distance between the distributions of a batch of tokens (SinKD)."""

    type: Literal["sinkhorn"]
    batch_tokens: PositiveInt = 32
    """Tokens transported together."""
    entropy_weight: PositiveFloat = 0.1
    """lambda: weight of the transport plan's entropy; 0 would be the exact distance."""
    iterations: PositiveInt = 20
    """Rounds of row and column normalisation."""

    @property
    def tokens_together(self) -> int:
        """A batch."""
        return self.batch_tokens


class AdaptiveClipKlConfig(TokenLossModel):
    """Forward KL on the tokens that hold most of the teacher's mass (after DAC-KL)."""

    type: Literal["adaptive_clip_kl"]
    mass: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Teacher probability that the tokens with a bucket of their own hold together, at least."""


TokenLossConfig = Annotated[
    CrossEntropyConfig
    | InterpolatedCrossEntropyConfig
    | ForwardKlConfig
    | ReverseKlConfig
    | GeneralizedJsdConfig
    | TotalVariationConfig
    | SkewKlConfig
    | SkewReverseKlConfig
    | TopKConfig
    | FirstConfig
    | SinkhornConfig
    | AdaptiveClipKlConfig,
    Field(discriminator="type"),
]


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


TermConfig = Annotated[HiddenMatchingConfig | RelationalConfig, Field(discriminator="type")]


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
    terms: tuple[TermConfig, ...] = ()
    """Added to the loss of every stream that is read; they look at hidden states."""

    @model_validator(mode="after")
    def _check_temperature(self) -> TokenMatchingConfig:
        for stream in ("off_policy", "on_policy"):
            loss: TokenLossConfig | None = getattr(self, stream)
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
        """What the stream's token loss and the terms need."""
        loss: TokenLossConfig | None = getattr(self, stream)
        if loss is None:
            return NOTHING
        return loss.needs | DISTRIBUTION if self.terms else loss.needs

    @property
    def needs_teacher_distribution(self) -> bool:
        """Whether the learner rebuilds the teacher's whole distribution."""
        losses = [loss for loss in (self.off_policy, self.on_policy) if loss is not None]
        return any(loss.needs.features for loss in losses)


ObjectiveConfig = Annotated[
    AmmdConfig | MinillmConfig | TokenMatchingConfig, Field(discriminator="type")
]
