"""What the teacher's engines write before the other pools start, where no step reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distill_system.config.evaluation import MetricName
from distill_system.driver.measuring import Evaluating
from distill_system.driver.standing_pools import supervise_standing
from distill_system.driver.start_check import start_writing
from distill_system.observe import FaultLog
from distill_system.records import Trajectory
from distill_system.rollout import RolloutPool
from distill_system.run.context import RunContext
from distill_system.run.pools import teacher_engines


@dataclass(frozen=True, slots=True)
class TeacherText:
    """start_check: to compare engines and scorers by.  held_out: to measure on. Both are empty
    where the engines stay, or write nothing."""

    start_check: Sequence[Trajectory] = ()
    held_out: Sequence[Trajectory] = ()


def write_teacher_text(
    context: RunContext,
    stage: str,
    *,
    metrics: Sequence[MetricName] | None = None,
    again: bool = False,
) -> TeacherText:
    """Start the teacher's engines, let them write what is read of them, evaluate, and end them.

    The text is the same, to the bit, as if they had stayed. What is lost meanwhile is replaced.
    stage: that this is for.  metrics, again: see Measuring.evaluate_teacher.
    Raises: ResourceError, DeadlineError, WorkerLostError, or what loading raised.
    """
    if not context.config.teacher_writes_first:
        return TeacherText()
    evaluating = Evaluating(context, context.data, metrics=metrics)
    with (
        context.timings.phase("teacher_rollout"),
        teacher_engines(context) as (workers, placed),
        FaultLog(context.run, stage, placed, writes=context.writes) as faults,
        supervise_standing(
            context.config, context.cluster, placed, fault_log=faults, notify=context.view.note
        ) as workers.supervision,
    ):
        pool = RolloutPool(workers)
        check = pool.finish(start_writing(pool, context.config, context.data))
        evaluating.evaluate_teacher_of(pool, again=again)
        return TeacherText(check, evaluating.write_held_out(pool))
