"""MiniLLM."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat

from distill_system.config.objective.needs import (
    NOTHING,
    ObjectiveModel,
    StreamName,
    TeacherNeeds,
)


class MinillmConfig(ObjectiveModel):
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

    @property
    def refuses_data(self) -> str | None:
        """A share of the mixture is the teacher's."""
        if self.teacher_mixture == 0:
            return None
        return (
            f"objective.teacher_mixture={self.teacher_mixture} mixes in text that the teacher "
            "wrote (0 mixes in none)"
        )
