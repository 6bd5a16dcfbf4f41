"""The story of a distillation: who makes what for whom, and who waits for whom.

    prompts --> student rollout --.
                                   >--> teacher scoring --> learner --> weights --> student rollout
    prompts --> teacher rollout --'

One step: the student and the teacher write; the teacher reads both; the learner plays the critics
up and the student down; every student rollout worker gets the new weights. How far the writers run
ahead of the learner is the streams' business: in lockstep (max_staleness 0) the weights that wrote
a trajectory learn from it, otherwise at most S + 1 batches are under way.
"""

from __future__ import annotations

import time
from dataclasses import replace

from distill_system.data import RunData
from distill_system.driver.engine_drift import EngineDrift
from distill_system.driver.learner_restarts import LearnerRestarts
from distill_system.driver.measuring import Measuring
from distill_system.driver.recorder import STAGE, RunRecorder
from distill_system.driver.start_check import StartCheck
from distill_system.driver.teacher_text import TeacherText
from distill_system.elastic import ElasticPools, ScaleRequests
from distill_system.errors import DeadlineError, NonFiniteError, WorkerLostError
from distill_system.observe import FaultLog
from distill_system.records import StepResult
from distill_system.run.context import RunContext
from distill_system.run.pools import Pools, restart_learner
from distill_system.streams import AsynchronousStreams, LockstepStreams, Streams


class Driver:
    """Runs the min-max game from its first step, or from a checkpoint, to the exported student.

    Lost workers are replaced while it goes on (elastic/). A lost rank of the learner ends a life of
    the run: all ranks start anew, and the next life begins where the newest checkpoint was.
    """

    def __init__(
        self,
        context: RunContext,
        pools: Pools,
        data: RunData,
        *,
        teacher_text: TeacherText | None = None,
    ) -> None:
        """teacher_text: what the teacher's engines wrote before these pools were started."""
        self.context = context
        self.config = context.config.distill
        self.pools = pools
        self.data = data
        self.teacher_text = teacher_text or TeacherText()
        lost_from = [*pools.placed, pools.ranks.name]
        self.faults = FaultLog(context.run, STAGE, lost_from, writes=context.writes)
        self.streams = open_streams(context, pools, data)
        self.elastic = ElasticPools(
            pools.placed,
            context.cluster,
            context.config.scaling,
            ScaleRequests(context.run),
            crew=self.streams,
            weights=pools.weights,
            faults=context.config.faults,
            fault_log=self.faults,
            notify=context.view.note,
            is_ending=lambda: context.stop.is_made,
        )
        self.restarts = LearnerRestarts(
            context, pools.ranks.name, self.faults, self._start_learner_anew
        )
        pools.supervise(self.elastic)
        self._begin_life()

    def _begin_life(self) -> None:
        """What a life of the run begins with; the pools outlive it."""
        context, pools, data = self.context, self.pools, self.data
        self.streams.supervision = self.elastic.supervise(self.streams)
        self.recorder = RunRecorder(context, pools, self.streams, self.faults)
        text = self.teacher_text
        self.start_check = StartCheck(context, pools, data, teacher_text=text.start_check)
        drift = EngineDrift(context, pools, data, self.streams.wait_for_weight_sync)
        self.measuring = Measuring(context, pools, data, drift=drift, teacher_text=text.held_out)

    def run(self) -> None:
        """Check that engines and learner agree, evaluate, play every step, evaluate, export."""
        with self.faults, self.elastic:
            while True:
                try:
                    return self._live()
                except (WorkerLostError, DeadlineError, NonFiniteError) as error:
                    self.restarts.lose(error)
                self.streams.abandon()
                self.pools.forget_calls()
                self.restarts.restart()
                self.context = replace(self.context, resume=True)
                self.streams = open_streams(self.context, self.pools, self.data)
                self._begin_life()

    def _live(self) -> None:
        """From the newest checkpoint, or from the beginning, to the end."""
        done = first = self.recorder.open()
        self.restarts.goes_on_after(first)
        self.pools.weights.publish(first)
        checked = self.start_check.run()
        self.measuring.evaluate_teacher()
        if first == 0:
            measured = self.measuring.evaluate_student("before", step=0)
            self.recorder.write(0, checked | measured | self._follow_sources(0))
        self.streams.begin(first)
        seconds = self.context.config.deadlines.stop_seconds
        with self.recorder.finished_on_failure(), self.context.stop.heard(seconds=seconds):
            for step in range(first, self.config.steps):
                if self.recorder.stopping.is_due:
                    break  # it was, when the run that is resumed here ended
                started = time.perf_counter()
                result = self.step(step)
                metrics = self.recorder.describe_step(result, time.perf_counter() - started)
                self.measuring.check_step(metrics)
                done = step + 1
                measured = self._measure(done) | self._follow_sources(done)
                self.streams.on_metrics(measured)
                if self.recorder.stops_after(measured) and done < self.config.steps:
                    measured |= self._measure_last(done)
                judged = self.recorder.watch_text(metrics | measured)
                self.recorder.write(done, metrics | measured | judged)
                is_last = self.context.stop.is_made or self.recorder.collapse.ends_run
                if is_last or self._is_due(done, self.config.checkpoint_every):
                    self.recorder.checkpoint(done)
                if is_last:
                    self.recorder.leave(done)
            if self.recorder.exports_other_weights:
                self.streams.wait_for_weight_sync()
                done = self.recorder.take_exported_weights(done)
                self.pools.weights.publish(done)
                self.measuring.evaluate_student("after", step=done)
        self.recorder.close(done)

    def _start_learner_anew(self) -> None:
        restart_learner(self.context, self.pools.ranks, self.pools.learner)
        self.pools.weights.break_up()

    def step(self, step: int) -> StepResult:
        """One update of critics and student, and the new weights on their way to the rollouts."""
        scored = self.streams.take(step)
        self._change_pools()
        result = self.streams.learn(step, scored)
        if self._student_writes_after(step + 1):
            self.streams.publish(step + 1)
        return result

    def _change_pools(self) -> None:
        """Let workers come and go, as a person or the automatic mode asks."""
        self.elastic.advance(self.recorder.observe_scaling)
        if self.elastic.has_changes():
            self.streams.wait_for_weight_sync()
            self.elastic.adopt()

    def _measure(self, done: int) -> dict[str, float]:
        """What is to be measured once `done` steps are done."""
        if not self._measures(done):
            return {}
        self.streams.wait_for_weight_sync()
        pools = self.recorder.describe_measured()
        if done == self.config.steps:
            return pools | self._measure_last(done)
        if self._evaluates(done):
            most, label = self.context.config.evaluation.num_examples_during, f"step_{done:06d}"
            return pools | self.measuring.evaluate_student(label, step=done, num_examples=most)
        return pools | self.measuring.measure_distances()

    def _measure_last(self, done: int) -> dict[str, float]:
        """The evaluation after distillation; of other weights than these it follows later."""
        if self.recorder.exports_other_weights:
            return self.measuring.measure_distances()
        return self.measuring.evaluate_student("after", step=done)

    def _follow_sources(self, done: int) -> dict[str, float]:
        """Let the sources' weights follow how far the student is behind on each, if they do."""
        if not self.streams.measures_sources(done):
            return {}
        return self.streams.follow_sources(done, self.measuring.measure_sources())

    def _student_writes_after(self, done: int) -> bool:
        """Whether anyone asks the student to write before the next step is done."""
        return self.config.objective.reads("on_policy") or self._measures(done)

    def _measures(self, done: int) -> bool:
        return self._is_due(done, self.config.measure_every) or self._evaluates(done)

    def _evaluates(self, done: int) -> bool:
        num_prompts = len(self.measuring.data.prompts)
        return self.config.evaluates_after(done, num_prompts=num_prompts)

    def _is_due(self, done: int, every: int | None) -> bool:
        is_last = done == self.config.steps or self.recorder.stopping.is_due
        return is_last or (every is not None and done % every == 0)


def open_streams(context: RunContext, pools: Pools, data: RunData) -> Streams:
    """Streams in lockstep with the learner, or ahead of it, as the configuration says."""
    if context.config.distill.staleness.max_staleness == 0:
        return LockstepStreams(context, pools, data)
    return AsynchronousStreams(context, pools, data)
