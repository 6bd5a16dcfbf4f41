"""Preferences between two responses, with the teacher as the reference."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat

from distill_system.config.objective.needs import (
    ObjectiveModel,
    RequiredSource,
    StreamName,
    TeacherNeeds,
)


class PreferenceConfig(ObjectiveModel):
    """Of two responses to a prompt the student is to find one likelier than the other, each against
    the teacher: DPO (arXiv 2305.18290) or KTO's form for pairs, with the teacher as the reference
    as in LLaVA-MoD (arXiv 2408.15881)."""

    type: Literal["preference"]
    loss: Literal["dpo", "kto_pair"] = "dpo"
    """dpo compares the two of a pair; kto_pair each of them with the batch mean of the others."""
    pairs: Literal["teacher_over_student", "data"] = "teacher_over_student"
    """teacher_over_student: in each step both answer the same prompts, and the teacher's answer is
    the better one. data: the rows of data.preferences, with off_policy_source=preferences."""
    beta: PositiveFloat = 0.1
    """How steeply the loss falls with the log-ratio of student to teacher."""

    def reads(self, stream: StreamName) -> bool:
        """The student's text only where it is the other half of a pair."""
        return stream == "off_policy" or self.pairs == "teacher_over_student"

    def teacher_needs(self, stream: StreamName) -> TeacherNeeds:
        """Log-probabilities of the tokens written."""
        return TeacherNeeds(logprobs=True)

    @property
    def needs_teacher_distribution(self) -> bool:
        """Its log-probabilities are enough."""
        return False

    @property
    def needs_source(self) -> RequiredSource:
        """Where the better answers come from."""
        return "preferences" if self.pairs == "data" else "teacher"

    @property
    def pairs_streams(self) -> bool:
        """Whether both streams answer the same prompts."""
        return self.pairs == "teacher_over_student"
