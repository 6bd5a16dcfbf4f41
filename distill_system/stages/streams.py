"""The two streams of a distillation: who writes what for which step, one step ahead or at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_system.data import PromptFrontier, RunData, source_shares
from distill_system.records import Prompt, Trajectory
from distill_system.rollout import PendingRollouts, Sampling
from distill_system.stages.context import RunContext
from distill_system.stages.pools import Pools
from distill_system.stages.replay import AdaptiveReplay, StepKind

HELD_OUT_LOSS = "held_out/cross_entropy"


class Streams:
    """Walks over prompts and rows in a seeded order, and has them answered.

    The off-policy stream does not depend on the student: it is asked for one step ahead, so that
    the teacher writes while others work.
    """

    def __init__(self, context: RunContext, pools: Pools, data: RunData) -> None:
        self.config = context.config
        self.pools = pools
        self.data = data
        seed = context.config.seed
        shares = source_shares(data.prompts, self.config.data.prompt_weights)
        self.student = PromptFrontier(shares, seed, "student_prompts")
        reads_rows = self.config.distill.off_policy_source == "dataset"
        self.teacher = (
            PromptFrontier(len(data.student_sft), seed, "dataset_rows")
            if reads_rows
            else PromptFrontier(shares, seed, "teacher_prompts")
        )
        self.reads_rows = reads_rows
        self._teacher_before = self.teacher.state()
        self._teacher_writing: PendingRollouts | None = None
        self._sampled = {"student": 0, "teacher": 0}
        self._fed: dict[str, list[str]] = {}
        distill = self.config.distill
        self.replay = (
            AdaptiveReplay(distill.replay, seed=seed, total_steps=distill.steps)
            if distill.replay is not None
            else None
        )

    def ask_ahead(self, step: int) -> None:
        """Let the teacher write a step's off-policy stream while others work."""
        self._teacher_before = self.teacher.state()
        if step < self.config.distill.steps and not self.reads_rows:
            taken = self.teacher.take(self.config.distill.sequences("off_policy"))
            prompts = [self.data.prompts[index] for index in taken]
            self._teacher_writing = self.pools.teachers.start(prompts, *self._how(step))

    def off_policy(self, step: int) -> Sequence[Trajectory]:
        """The step's rows of data, or what the teacher was asked for last."""
        return self._feed("off_policy", self._off_policy(step))

    def on_policy(self, step: int) -> Sequence[Trajectory]:
        """What the student writes now, under its newest weights; or wrote, if there is replay."""
        return self._feed("on_policy", self._on_policy(step))

    def _off_policy(self, step: int) -> Sequence[Trajectory]:
        if not self.reads_rows:
            assert self._teacher_writing is not None, "the teacher is asked one step ahead"
            return self._count("teacher", self.pools.teachers.finish(self._teacher_writing))
        if self.replay is not None and self.replay.choose(step) is not StepKind.DATA:
            return ()
        taken = self.teacher.take(self.config.distill.sequences("off_policy"))
        return [self.data.student_sft[index] for index in taken]

    def _on_policy(self, step: int) -> Sequence[Trajectory]:
        count = self.config.distill.sequences("on_policy")
        kind = StepKind.WRITE if self.replay is None else self.replay.choose(step)
        if self.replay is not None and kind is StepKind.REPLAY:
            return self.replay.sample(step, count)
        if kind is StepKind.DATA:
            return ()
        prompts: list[Prompt] = [self.data.prompts[index] for index in self.student.take(count)]
        written = self._count("student", self.pools.students.generate(prompts, *self._how(step)))
        if self.replay is not None:
            self.replay.keep(written)
        return written

    def pop_counts(self) -> dict[str, float]:
        """Response tokens that each model sampled since this was last asked, as metrics."""
        counts, self._sampled = self._sampled, {"student": 0, "teacher": 0}
        return {f"sampled_tokens/{author}": float(count) for author, count in counts.items()}

    def pop_prompts(self) -> dict[str, list[str]]:
        """Prompt ids of each stream that was fed since this was last asked: one step's."""
        fed, self._fed = self._fed, {}
        return fed

    def hear(self, measured: Mapping[str, float]) -> None:
        """Take in what was measured on held-out data, where the schedule depends on it."""
        if self.replay is not None and HELD_OUT_LOSS in measured:
            self.replay.hear(measured[HELD_OUT_LOSS])

    def state(self) -> dict[str, Any]:
        """The position from which the steps not yet learned from are fed again."""
        state: dict[str, Any] = {"student": self.student.state(), "teacher": self._teacher_before}
        return state if self.replay is None else state | {"replay": self.replay.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a position that `state` returned."""
        self.student.restore(state["student"])
        self.teacher.restore(state["teacher"])
        self._teacher_before = self.teacher.state()
        if self.replay is not None:
            self.replay.restore(state["replay"])

    def _feed(self, stream: str, fed: Sequence[Trajectory]) -> Sequence[Trajectory]:
        self._fed.setdefault(stream, []).extend(trajectory.prompt_id for trajectory in fed)
        return fed

    def _count(self, author: str, written: list[Trajectory]) -> list[Trajectory]:
        self._sampled[author] += sum(trajectory.num_response_tokens for trajectory in written)
        return written

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
