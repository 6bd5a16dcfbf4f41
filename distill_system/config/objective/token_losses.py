"""Losses between two policies at one token, a union on `type`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt

from distill_system.config.base import ConfigModel
from distill_system.config.objective.needs import (
    DISTRIBUTION,
    NOTHING,
    OpenShare,
    Share,
    TeacherNeeds,
)


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

    @property
    def reads_written_token(self) -> bool:
        """Whether the loss at a state depends on the token that was written there."""
        return False

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

    @property
    def reads_written_token(self) -> bool:
        """The text is all that it reads."""
        return True


class InterpolatedCrossEntropyConfig(TokenLossModel):
    """Cross-entropy to a mixture of the token written and the teacher's distribution (PS-KD)."""

    type: Literal["interpolated_cross_entropy"]
    teacher_weight: Share = 0.8
    """w: the teacher's share of the target; the token written has the rest."""
    schedule: Literal["linear", "constant"] = "linear"
    """linear: w grows with the steps, from near 0 to teacher_weight at the last one."""

    @property
    def reads_written_token(self) -> bool:
        """One part of the target is the token written."""
        return True

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


class TopTokensModel(TokenLossModel):
    """What a loss on the teacher's most likely tokens has."""

    k: PositiveInt

    @property
    def needs(self) -> TeacherNeeds:
        """The k tokens and their log-probabilities."""
        return TeacherNeeds(top_k=self.k)


class TopKConfig(TopTokensModel):
    """A divergence between the teacher's k most likely tokens and one bucket for all others."""

    type: Literal["top_k"]
    k: PositiveInt = 32
    """Tokens with a bucket of their own."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """How the k + 1 buckets are compared; jsd mixes both policies half and half."""


class FirstConfig(TopTokensModel):
    """Cross-entropy to the teacher's renormalised, recalibrated top-k (FIRST)."""

    type: Literal["first"]
    k: PositiveInt = 5
    """Tokens that the target is made of."""
    recalibration_temperature: PositiveFloat = 1.0
    """The k log-probabilities are divided by it before they are renormalised."""


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
