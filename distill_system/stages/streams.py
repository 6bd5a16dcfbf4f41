"""The two streams of a distillation: who writes what for which step, one step ahead or at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_system.data import PromptFrontier, RunData
from distill_system.records import Prompt, Trajectory
from distill_system.rollout import PendingRollouts, Sampling
from distill_system.stages.context import RunContext
from distill_system.stages.pools import Pools


class Streams:
    """Walks over prompts and rows in a seeded order, and has them answered.

    The off-policy stream does not depend on the student: it is asked for one step ahead, so that
    the teacher writes while others work.
    """

    def __init__(self, context: RunContext, pools: Pools, data: RunData) -> None:
        self.config = context.config
        self.pools = pools
        self.data = data
        seed, num_prompts = context.config.seed, len(data.prompts)
        self.student = PromptFrontier(num_prompts, seed, "student_prompts")
        reads_rows = self.config.distill.off_policy_source == "dataset"
        self.teacher = (
            PromptFrontier(len(data.student_sft), seed, "dataset_rows")
            if reads_rows
            else PromptFrontier(num_prompts, seed, "teacher_prompts")
        )
        self.reads_rows = reads_rows
        self._teacher_before = self.teacher.state()
        self._rows: Sequence[Trajectory] = ()
        self._teacher_writing: PendingRollouts | None = None

    def ask_ahead(self, step: int) -> None:
        """Let the off-policy stream of a step be written while others work."""
        if step >= self.config.distill.steps:
            return
        self._teacher_before = self.teacher.state()
        taken = self.teacher.take(self.config.distill.teacher_prompts_per_step)
        if self.reads_rows:
            self._rows = [self.data.student_sft[index] for index in taken]
        else:
            prompts = [self.data.prompts[index] for index in taken]
            self._teacher_writing = self.pools.teachers.start(prompts, *self._how(step))

    def off_policy(self) -> Sequence[Trajectory]:
        """What was asked for last."""
        if self.reads_rows:
            return self._rows
        assert self._teacher_writing is not None, "the off-policy stream is asked one step ahead"
        return self.pools.teachers.finish(self._teacher_writing)

    def on_policy(self, step: int) -> Sequence[Trajectory]:
        """What the student writes now, under its newest weights."""
        taken = self.student.take(self.config.distill.student_prompts_per_step)
        prompts: list[Prompt] = [self.data.prompts[index] for index in taken]
        return self.pools.students.generate(prompts, *self._how(step))

    def state(self) -> dict[str, Any]:
        """The position from which the steps not yet learned from are fed again."""
        return {"student": self.student.state(), "teacher": self._teacher_before}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a position that `state` returned."""
        self.student.restore(state["student"])
        self.teacher.restore(state["teacher"])
        self._teacher_before = self.teacher.state()

    def _how(self, step: int) -> tuple[Sampling, int, str]:
        """Sampling, seed and label of a step's rollouts."""
        sampling = self.config.rollout.sampling
        return (
            Sampling(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_response_tokens=sampling.max_response_tokens,
            ),
            self.config.seed,
            f"step_{step}",
        )
