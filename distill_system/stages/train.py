"""The stages in order: fine-tune both models, distil, evaluate, report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

from distill_system.cluster import ClusterSession
from distill_system.config import RunConfig
from distill_system.data import RunData, load_run_data
from distill_system.data.run_data import SetName
from distill_system.driver import Driver
from distill_system.observe import (
    LiveView,
    MetricLog,
    RunDirectory,
    Timings,
    write_report,
    write_summary,
)
from distill_system.stages.context import RunContext, sft_directory
from distill_system.stages.measuring import Measuring
from distill_system.stages.pools import open_pools
from distill_system.stages.preparation import open_run, prepare_tokenizer
from distill_system.stages.supervised import fine_tune

STAGES = ("sft", "distill", "evaluate", "report")


def train(
    config: RunConfig, *, resume: bool = False, stages: Collection[str] = STAGES
) -> RunDirectory:
    """Run the stages asked for, each skipped when its output exists.

    resume: continue unfinished stages from their newest checkpoints.
    Returns the run's folder.
    Raises: DistillError with one message for the person; every worker is ended first.
    """
    run = open_run(config)
    work = [stage for stage in _due(config, run) if stage in stages]
    if work:
        with open_context(config, run, resume=resume) as context:
            for stage in work:
                _RUNNERS[stage](context)
    if "report" in stages:
        write_summary(run)
        write_report(run)
    return run


def _due(config: RunConfig, run: RunDirectory) -> Iterator[str]:
    """Stages that need workers and whose output does not exist yet."""
    if _untuned_roles(config, run):
        yield "sft"
    if not run.student_directory.exists():
        yield "distill"
    if not all(run.evaluation_path(label).exists() for label in ("before", "after")):
        yield "evaluate"


@contextmanager
def open_context(config: RunConfig, run: RunDirectory, *, resume: bool) -> Iterator[RunContext]:
    """Everything a stage needs, for the length of a block; workers end with it."""
    with ExitStack() as stack:
        tokenizer = prepare_tokenizer(config, run)
        view = stack.enter_context(LiveView(config.name))
        log = stack.enter_context(MetricLog(run, run_name=config.name))
        cluster = stack.enter_context(ClusterSession(config, say=view.note))
        yield RunContext(
            config=config,
            run=run,
            cluster=cluster,
            tokenizer=tokenizer,
            log=log,
            timings=Timings(run),
            view=view,
            resume=resume,
        )


def _run_sft(context: RunContext) -> None:
    roles = _untuned_roles(context.config, context.run)
    sets: dict[str, SetName] = {"teacher": "teacher_sft", "student": "student_sft"}
    data = load_run_data(context.config, context.tokenizer, [sets[role] for role in roles])
    _tell_removed(context, data)
    fine_tune(context, {role: getattr(data, f"{role}_sft") for role in roles})


def _run_distill(context: RunContext) -> None:
    data = load_run_data(
        context.config, context.tokenizer, sets=["prompts", "held_out", "evaluation"]
    )
    _tell_removed(context, data)
    with context.timings.stage("distill"):
        pools = open_pools(context, student_path=context.student_path)
        Driver(context, pools, data).run()


def _run_evaluate(context: RunContext) -> None:
    """Make the evaluations that distillation has not already made with its own workers."""
    students = {"before": context.student_path, "after": str(context.run.student_directory)}
    steps = {"before": 0, "after": context.config.distill.steps}
    missing = [label for label in students if not context.run.evaluation_path(label).exists()]
    if not missing:
        return
    data = load_run_data(context.config, context.tokenizer, sets=["held_out", "evaluation"])
    for label in missing:
        with context.timings.stage("evaluate"):
            pools = open_pools(context, student_path=students[label])
            measuring = Measuring(context, pools, data)
            pools.learner.publish(steps[label])
            measuring.evaluate_teacher()
            measuring.evaluate_student(label, step=steps[label])
            context.cluster.stop_all()


def _untuned_roles(config: RunConfig, run: RunDirectory) -> list[str]:
    wanted = {"teacher": config.teacher.sft, "student": config.student.sft}
    return [
        role
        for role, sft in wanted.items()
        if sft is not None and not sft_directory(run, role).exists()
    ]


def _tell_removed(context: RunContext, data: RunData) -> None:
    for name, count in data.num_removed.items():
        if count:
            context.view.note(
                f"data.{name}: {count} rows left out, their prompts stand in an evaluation split"
            )


_RUNNERS: dict[str, Callable[[RunContext], None]] = {
    "sft": _run_sft,
    "distill": _run_distill,
    "evaluate": _run_evaluate,
}
