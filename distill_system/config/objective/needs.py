"""What an objective may ask of the teacher, and the words that objectives share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

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
