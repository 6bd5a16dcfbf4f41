"""Supervised fine-tuning of the teacher and of the student, side by side on their own learners."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from distill_system.config.model import ModelConfig, SupervisedConfig
from distill_system.data import PromptFrontier
from distill_system.driver.learner_restarts import LearnerRestarts
from distill_system.errors import DeadlineError, NonFiniteError, WorkerLostError
from distill_system.learner import LearnerGroup
from distill_system.observe import FaultLog, PoolClock
from distill_system.records import StepResult, Trajectory
from distill_system.run.checkpoints import CheckpointStore, resume_point
from distill_system.run.context import RunContext, sft_directory
from distill_system.run.export import export_model
from distill_system.run.pools import connect_learner, model_source, restart_learner
from distill_system.run.worker_requests import learner_request
from distill_system.workers import Reference

LEARNER = 0
"""The learner's ranks work side by side: its clock counts them as one worker."""

STEPS_IN_FLIGHT = 2
"""Updates that are queued at the learner, so that it never waits for this process's batches."""


def fine_tune(context: RunContext, rows: dict[str, Sequence[Trajectory]]) -> None:
    """Fine-tune each role of `rows`, side by side if the cluster has room; one failure ends all.

    A lost rank starts its learner anew from the newest checkpoint, as in distillation. A role that
    is ended early exports nothing; --resume continues it from its newest checkpoint.
    """
    stop = threading.Event()
    both_fit = context.cluster.has_room_for(context.config.pools.learner, len(rows))
    heard = context.stop.heard(seconds=context.config.deadlines.stop_seconds)
    context.cluster.monitor.supervise(map(_learner_name, rows))
    with ExitStack() as stack:
        stack.enter_context(heard)
        logs = {role: stack.enter_context(_fault_log(context, role)) for role in rows}
        threads = stack.enter_context(ThreadPoolExecutor(len(rows) if both_fit else 1))
        futures = [
            threads.submit(_fine_tune_role, context, role, trajectories, stop, logs[role])
            for role, trajectories in rows.items()
        ]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if context.stop.is_made:
                raise KeyboardInterrupt
        except BaseException:  # a failure, or Ctrl-C
            # The other thread may wait for a worker; killing the workers ends that wait with an
            # error. Without it, leaving the executor's block would wait for the thread.
            stop.set()
            context.cluster.abandon_all()
            raise


def _learner_name(role: str) -> str:
    return f"sft_{role}_learner"


def _fault_log(context: RunContext, role: str) -> FaultLog:
    stage, learners = f"sft_{role}", [_learner_name(role)]
    return FaultLog(context.run, stage, learners, writes=context.writes)


def _fine_tune_role(
    context: RunContext,
    role: str,
    rows: Sequence[Trajectory],
    stop: threading.Event,
    faults: FaultLog,
) -> None:
    if context.stop.is_made:
        return  # while the other role was fine-tuned
    stage = f"sft_{role}"
    model: ModelConfig = getattr(context.config, role)
    assert model.sft is not None, "only roles with sft are fine-tuned"
    with context.timings.stage(stage):
        request = learner_request(
            context,
            name=_learner_name(role),
            source=model_source(context, model),
            objective=None,
            compute_dtype=model.sft.compute_dtype,
            optimizer=model.sft.optimizer,
            total_steps=model.sft.steps,
        )
        workers = context.cluster.start_workers(request)
        learner = connect_learner(context, workers)
        start_anew = partial(restart_learner, context, workers, learner)
        restarts = LearnerRestarts(context, workers.name, faults, start_anew)
        while True:
            fine_tuning = FineTuning(context, stage, model.sft, learner, rows)
            try:
                if not fine_tuning.run(stop, restarts, faults):
                    return
                break
            except (WorkerLostError, DeadlineError, NonFiniteError) as error:
                if stop.is_set():
                    raise  # the other role has failed, and this one's workers were ended
                restarts.lose(error)
            restarts.restart()
            context = replace(context, resume=True)
        export_model(context, learner, sft_directory(context.run, role), facts={"stage": stage})
        fine_tuning.store.clear()
        learner.close()
        context.cluster.stop_workers(workers)


class FineTuning:
    """The training loop of one role: rows in a seeded order, a few updates queued ahead."""

    def __init__(
        self,
        context: RunContext,
        stage: str,
        config: SupervisedConfig,
        learner: LearnerGroup,
        rows: Sequence[Trajectory],
    ) -> None:
        self.context = context
        self.stage = stage
        self.config = config
        self.learner = learner
        self.rows = rows
        self.frontier = PromptFrontier(len(rows), context.config.seed, stage)
        self.clock = PoolClock([LEARNER], time.perf_counter())
        folder = context.run.checkpoints_directory / stage
        self.store = CheckpointStore(folder, keep=1, writes=context.writes)

    def run(self, stop: threading.Event, restarts: LearnerRestarts, faults: FaultLog) -> bool:
        """Train, from the newest checkpoint if the run is resumed; returns False if stopped early.

        stop: when it is set, no further updates are begun.
        restarts: told where the run goes on.  faults: told of the steps done.
        """
        first = self._resume()
        restarts.goes_on_after(first)
        task = self.context.view.start(
            self.stage,
            self.config.steps,
            first_step=first,
            earlier_seconds=self.context.timings.seconds.get(self.stage, 0.0),
        )
        with self.store.finished_on_failure(self.learner):
            for result, prompt_ids in self._results(first, stop):
                faults.step = result.step + 1
                self.context.log.log(self.stage, result.step, result.metrics)
                self.context.prompts.log(self.stage, result.step, {"off_policy": prompt_ids})
                task.update(
                    result.step + 1,
                    {
                        "loss": result.metrics["learner/loss"],
                        "tok/s": result.num_response_tokens / result.seconds,
                    },
                )
            if self.context.stop.is_made and self._is_unsaved(task.step, first):
                self._save(task.step)
            self.store.finish(self.learner, wait=True)
        if task.step < self.config.steps:
            return False
        task.finish()
        return True

    def _results(self, first: int, stop: threading.Event) -> Iterator[tuple[StepResult, list[str]]]:
        """Results in order, each with the ids of its rows.

        Up to STEPS_IN_FLIGHT updates are in flight, except at a checkpoint: before it is begun, all
        updates are finished and logged, so that its state and the log agree.
        """
        in_flight: deque[tuple[list[Reference], list[str]]] = deque()
        for step in range(first, self.config.steps):
            if stop.is_set():
                return
            if self.context.stop.is_made:
                break  # what is in flight is finished and logged: a checkpoint of it follows
            batch = [self.rows[i] for i in self.frontier.take(self.config.batch_size)]
            self.clock.begin(LEARNER, time.perf_counter())
            asked = self.learner.start_supervised(step, batch)
            in_flight.append((asked, [row.prompt_id for row in batch]))
            saves = (step + 1) % self.config.checkpoint_every == 0
            while len(in_flight) > (0 if saves else STEPS_IN_FLIGHT):
                yield self._finish(*in_flight.popleft())
            self.store.finish(self.learner, wait=False)
            if saves:
                self._save(step + 1)
        while in_flight:
            yield self._finish(*in_flight.popleft())

    def _is_unsaved(self, done: int, first: int) -> bool:
        """Whether a run that ends after so many steps would lose some of them."""
        return first < done < self.config.steps and done % self.config.checkpoint_every != 0

    def _save(self, done: int) -> None:
        self.store.start(done, {"frontier": self.frontier.state()}, self.learner)
        self.context.timings.save()

    def _finish(
        self, references: list[Reference], prompt_ids: list[str]
    ) -> tuple[StepResult, list[str]]:
        with self.context.timings.phase("learner", stage=self.stage):
            result = self.learner.finish_supervised(references)
        now = time.perf_counter()
        self.clock.end(LEARNER, now, busy_seconds=result.seconds)
        self.clock.hand_on(num_tokens=result.num_response_tokens, num_sequences=len(prompt_ids))
        self.context.timings.add_activity({"learner": self.clock.pop(now)}, stage=self.stage)
        return result, prompt_ids

    def _resume(self) -> int:
        checkpoint = resume_point(
            self.store,
            resume=self.context.resume,
            stage=self.stage,
            steps=self.config.steps,
        )
        done = 0 if checkpoint is None else checkpoint.step
        self.context.log.truncate_after(self.stage, done - 1)
        self.context.prompts.truncate_after(self.stage, done - 1)
        if checkpoint is not None:
            self.store.load(checkpoint, self.learner)
            self.frontier.restore(checkpoint.state["frontier"])
        elif not self.context.resume:
            self.context.timings.restart(self.stage)
        return done
