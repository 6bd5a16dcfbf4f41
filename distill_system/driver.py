"""The story of a distillation: who makes what for whom, and who waits for whom.

    prompts --> student rollout --\
                                   +--> teacher scoring --> learner --> weights --> student rollout
    prompts --> teacher rollout --/

One step: the student writes under the newest weights; the teacher has written ahead; the teacher
reads both; the learner plays the critics up and the student down; every rollout worker gets the
new weights. Synchronous: max_staleness 0.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from distill_system.data import PromptFrontier, RunData
from distill_system.records import Prompt, StepResult, Stream, Trajectory
from distill_system.rollout import PendingRollouts, Sampling
from distill_system.stages.checkpoints import CheckpointStore, resume_point
from distill_system.stages.context import RunContext
from distill_system.stages.export import export_model
from distill_system.stages.measuring import Measuring, held_out_metrics
from distill_system.stages.pools import Pools

STAGE = "distill"


class Driver:
    """Runs the min-max game from its first step, or from a checkpoint, to the exported student."""

    def __init__(self, context: RunContext, pools: Pools, data: RunData) -> None:
        self.context = context
        self.config = context.config.distill
        self.pools = pools
        self.data = data
        self.measuring = Measuring(context, pools, data)
        seed, num_prompts = context.config.seed, len(data.prompts)
        self.student_frontier = PromptFrontier(num_prompts, seed, "student_prompts")
        self.teacher_frontier = PromptFrontier(num_prompts, seed, "teacher_prompts")
        self.teacher_state = self.teacher_frontier.state()
        self.teacher_writing: PendingRollouts | None = None
        folder = context.run.checkpoints_directory / STAGE
        self.store = CheckpointStore(folder, keep=self.config.keep_checkpoints)

    def run(self) -> None:
        """Evaluate, play every step, evaluate again, export."""
        first = self._resume()
        task = self.context.view.start(STAGE, self.config.steps, first_step=first)
        self.pools.learner.publish(first)
        self.measuring.evaluate_teacher()
        if first == 0:
            self.context.log.log(STAGE, 0, self.measuring.evaluate_student("before", step=0))
        self._ask_teacher(first)
        shown: dict[str, float] = {}
        for step in range(first, self.config.steps):
            started = time.perf_counter()
            result = self.step(step)
            metrics = self._timed(result, time.perf_counter() - started)
            metrics |= self._after(step + 1)
            self.context.log.log(STAGE, step + 1, metrics)
            shown |= _shown(metrics)
            task.update(step + 1, shown)
        self._finish()
        task.finish()

    def step(self, step: int) -> StepResult:
        """One update of critics and student, and the new weights at every rollout worker."""
        phase = self.context.timings.phase
        with phase("teacher_rollout") as waited:
            off_policy = self.pools.scorers.start(
                self._teacher_wrote(), Stream.OFF_POLICY, num_shares=self._ranks
            )
            waited.tokens += sum(chunk.chunk.num_response_tokens for chunk in off_policy)
        with phase("student_rollout") as waited:
            prompts = self._take(self.student_frontier, self.config.student_prompts_per_step)
            written = self.pools.students.generate(prompts, self._sampling, *self._label(step))
            waited.tokens += sum(trajectory.num_response_tokens for trajectory in written)
        with phase("teacher_scoring") as waited:
            on_policy = self.pools.scorers.start(written, Stream.ON_POLICY, num_shares=self._ranks)
            scored = [*off_policy, *on_policy]
            self.pools.scorers.wait(scored)
            waited.tokens += sum(chunk.chunk.num_tokens for chunk in scored)
        self._ask_teacher(step + 1)
        with phase("learner") as waited:
            result = self.pools.learner.learn(
                step, [(chunk.chunk, chunk.targets) for chunk in scored]
            )
            waited.tokens += result.num_response_tokens
        with phase("publish"):
            self.pools.learner.publish(step + 1)
        return result

    def _ask_teacher(self, step: int) -> None:
        """Let the teacher write the step's off-policy stream while others work."""
        self.teacher_state = self.teacher_frontier.state()
        self.teacher_writing = None
        if step < self.config.steps and self.config.teacher_prompts_per_step > 0:
            prompts = self._take(self.teacher_frontier, self.config.teacher_prompts_per_step)
            self.teacher_writing = self.pools.teachers.start(
                prompts, self._sampling, *self._label(step)
            )

    def _teacher_wrote(self) -> Sequence[Trajectory]:
        if self.teacher_writing is None:
            return ()
        return self.pools.teachers.finish(self.teacher_writing)

    def _after(self, done: int) -> dict[str, float]:
        """What is due once `done` steps are done; returns what it measured."""
        config, measured = self.config, {}
        last = done == config.steps
        if config.evaluate_every and done % config.evaluate_every == 0 and not last:
            most = self.context.config.evaluation.num_examples_during
            measured = self.measuring.evaluate_student(
                f"step_{done:06d}", step=done, num_examples=most
            )
        elif done % config.measure_every == 0 and not last:
            measured = held_out_metrics(self.measuring.measure_distances())
        if last:
            measured = self.measuring.evaluate_student("after", step=done)
        if done % config.checkpoint_every == 0 or last:
            self._save(done)
        return measured

    def _save(self, done: int) -> None:
        state = {
            "student_frontier": self.student_frontier.state(),
            "teacher_frontier": self.teacher_state,
            "weight_version": done,
        }
        self.store.save(done, state, self.pools.learner.save)
        self.context.timings.save()

    def _resume(self) -> int:
        checkpoint = resume_point(self.store, resume=self.context.resume, stage=STAGE)
        if checkpoint is None:
            self.context.log.truncate_after(STAGE, -1)
            self.context.timings.restart(STAGE)
            return 0
        self.pools.learner.load(checkpoint.folder)
        self.student_frontier.restore(checkpoint.state["student_frontier"])
        self.teacher_frontier.restore(checkpoint.state["teacher_frontier"])
        self.context.log.truncate_after(STAGE, checkpoint.step)
        self.context.view.note(f"resuming {STAGE} after step {checkpoint.step}")
        return checkpoint.step

    def _finish(self) -> None:
        objective = self.context.config.distill.objective
        facts = {
            "teacher": self.context.teacher_path,
            "student before": self.context.student_path,
            "objective": objective.model_dump_json(),
            "steps": self.config.steps,
            "prompts per step": self.config.student_prompts_per_step
            + self.config.teacher_prompts_per_step,
        }
        export_model(
            self.context, self.pools.learner, self.context.run.student_directory, facts=facts
        )

    def _timed(self, result: StepResult, seconds: float) -> dict[str, float]:
        """The step's metrics with where its time went; the driver's own part is what is left."""
        phases = self.context.timings.pop_step_metrics()
        waited = sum(value for name, value in phases.items() if name.startswith("seconds/"))
        own = {"seconds/driver": seconds - waited, "seconds/step": seconds}
        rate = {"tokens_per_second/step": result.num_response_tokens / seconds}
        return {**result.metrics, **phases, **own, **rate}

    def _take(self, frontier: PromptFrontier, count: int) -> list[Prompt]:
        return [self.data.prompts[index] for index in frontier.take(count)]

    def _label(self, step: int) -> tuple[int, str]:
        return self.context.config.seed, f"step_{step}"

    @property
    def _sampling(self) -> Sampling:
        sampling = self.context.config.rollout.sampling
        return Sampling(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_response_tokens=sampling.max_response_tokens,
        )

    @property
    def _ranks(self) -> int:
        return self.context.config.pools.learner.count


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    """What the live view shows; a distance stays until it is measured again."""
    names = {
        "tokens_per_second/step": "tok/s",
        "held_out/on_policy_distance": "on-policy distance",
        "held_out/off_policy_distance": "off-policy distance",
    }
    return {shown: metrics[name] for name, shown in names.items() if name in metrics}
