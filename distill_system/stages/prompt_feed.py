"""Which prompts each stream answers next, and the position that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_system.config.run import DistillConfig
from distill_system.data import PromptFrontier
from distill_system.records import Prompt


class PromptFeed:
    """Two walks over the same prompts; the teacher is asked one step ahead of the student."""

    def __init__(self, prompts: Sequence[Prompt], config: DistillConfig, seed: int) -> None:
        self.prompts = prompts
        self.config = config
        self.student = PromptFrontier(len(prompts), seed, "student_prompts")
        self.teacher = PromptFrontier(len(prompts), seed, "teacher_prompts")
        self._teacher_before = self.teacher.state()

    def next_for_student(self) -> list[Prompt]:
        """The on-policy stream's prompts of one step."""
        return self._take(self.student, self.config.student_prompts_per_step)

    def next_for_teacher(self) -> list[Prompt]:
        """The off-policy stream's prompts of one step; a checkpoint stands before them."""
        self._teacher_before = self.teacher.state()
        return self._take(self.teacher, self.config.teacher_prompts_per_step)

    def state(self) -> dict[str, Any]:
        """The position from which the steps not yet learned from are fed again."""
        return {"student": self.student.state(), "teacher": self._teacher_before}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a position that `state` returned."""
        self.student.restore(state["student"])
        self.teacher.restore(state["teacher"])
        self._teacher_before = self.teacher.state()

    def _take(self, frontier: PromptFrontier, count: int) -> list[Prompt]:
        return [self.prompts[index] for index in frontier.take(count)]
