"""The stages in order: fine-tune both models, distil, evaluate, report."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from distill_system.cluster import ClusterSession, require_joinable, require_room
from distill_system.config import RunConfig
from distill_system.data import RunData
from distill_system.data.run_data import SetName
from distill_system.driver import Driver
from distill_system.driver.measuring import Measuring
from distill_system.driver.standing_pools import measure_standing
from distill_system.driver.teacher_text import write_teacher_text
from distill_system.errors import DistillError, RunStateError
from distill_system.evaluation import check_evaluation
from distill_system.logs import (
    DRIVER,
    LOGGER_NAME,
    close_log,
    log_path,
    name_logs,
    open_log,
)
from distill_system.observe import (
    JobPage,
    LiveView,
    MetricLog,
    PromptLog,
    RunDirectory,
    RunGauges,
    RunWrites,
    Timings,
    require_trackers,
    write_report,
    write_summary,
)
from distill_system.observe.run_directory import told_as_unwritable
from distill_system.observe.run_lock import locked
from distill_system.observe.summary import read_evaluation
from distill_system.records import Author
from distill_system.run.checkpoints import CheckpointStore, resume_point
from distill_system.run.context import RunContext, sft_directory
from distill_system.run.export import holds_model
from distill_system.run.machine_checks import machine_notes, require_machine
from distill_system.run.mirror import mirrored
from distill_system.run.model_checks import check_data, check_engine
from distill_system.run.model_data import load_model_data
from distill_system.run.model_sources import with_folders
from distill_system.run.pools import open_pools
from distill_system.run.preparation import (
    open_run,
    prepare_tokenizer,
    record_start,
    refusal_leaves_nothing,
    require_begun,
    run_directory,
    with_chat_date,
)
from distill_system.run.sample_origin import sample_origin
from distill_system.run.settings_notes import settings_notes
from distill_system.run.vocabulary import stop_token_ids
from distill_system.stages.evaluations import (
    describe_standing,
    find_lacking,
    find_steps,
    wanted_metrics,
)
from distill_system.stages.push import push_student, require_token
from distill_system.stages.supervised import fine_tune
from distill_system.stopping import StopRequest

STAGES = ("sft", "distill", "evaluate", "report", "push")


def train(
    config: RunConfig,
    *,
    resume: bool | Literal["auto"] = False,
    stages: Collection[str] = STAGES,
    followed_by: Collection[str] = (),
    notify: Callable[[str], None] = print,
    stop: StopRequest | None = None,
) -> RunDirectory:
    """Run these stages; a stage whose output exists is skipped.

    resume: continue unfinished stages from their newest checkpoints; "auto": or begin the run.
    followed_by: stages of other runs that begin where this one ends. Their data is read before
        these stages start, so that no fine-tuning is spent on runs that could not begin.
    notify: takes lines for the person.
    stop: made by a signal handler when a person wants the run to end: it then writes a checkpoint
        after the step under way and raises KeyboardInterrupt.
    Returns the run's folder.
    Raises: DistillError with one message for the person; every worker is ended first.
    """
    if "push" in stages:
        require_token(config)
    folder = run_directory(config)
    with locked(folder, notify=notify), mirrored(config, folder, notify=notify):
        run = open_run(config)
        if resume is True:
            require_begun(run)
        config = with_chat_date(config, run)
        _make(
            config,
            run,
            resume=resume,
            stages=stages,
            followed_by=followed_by,
            notify=notify,
            stop=stop,
        )
        if "push" in stages:
            address = push_student(config, run, notify=notify)
            if address is not None:
                notify(f"pushed: {address}")
    return run


def _make(
    config: RunConfig,
    run: RunDirectory,
    *,
    resume: bool | Literal["auto"],
    stages: Collection[str],
    followed_by: Collection[str],
    notify: Callable[[str], None],
    stop: StopRequest | None,
) -> None:
    """Everything of these stages that the folder lacks, then the report."""
    # A stage that is done already is not in `work`; a run whose work is done starts no cluster.
    work = [stage for stage in _due(config, run) if stage in stages]
    _require_inputs(config, run, work)
    if work:
        require_joinable()
    for stage, steps in _checkpointed(config, run, work).items():
        store = CheckpointStore(run.checkpoints_directory / stage, keep=1)
        # Refuse a missing --resume now, before workers have been started for nothing.
        found = resume_point(store, resume=bool(resume), stage=stage, steps=steps)
        if found is None and resume is True:
            notify(f"{stage}: no checkpoint in {store.folder}, it begins anew")
    if {"distill", "evaluate"} & {*work}:
        check_engine(config)
    require_trackers(config.trackers)
    if work:
        with refusal_leaves_nothing(run) as begin:
            record_start(config, run)
            models, sets = with_folders(config, run), find_sets(config, run, {*work, *followed_by})
            with open_context(models, run, resume=bool(resume), sets=sets, stop=stop) as context:
                begin()
                for stage in work:
                    _RUNNERS[stage](context)
    if "evaluate" in stages and "sft" not in stages and not work:
        notify(f"nothing to evaluate: {describe_standing(run)}")
    unwritten = [label for label in ("before", "after") if read_evaluation(run, label) is None]
    if "evaluate" in work and unwritten:
        raise RunStateError(
            f"the evaluations {', '.join(unwritten)} could not be written to "
            f"{run.evaluations_directory}. Make room on its disk: `distill-system evaluate` makes "
            "them again"
        )
    if "report" in stages:
        require_a_run(run)
        writes = RunWrites(notify, seconds=config.deadlines.call_seconds)
        with told_as_unwritable(run.report_path):
            writes.require(run.summary_path, lambda: write_summary(run))
            writes.require(run.report_path, lambda: write_report(run))


def _due(config: RunConfig, run: RunDirectory) -> Iterator[str]:
    """Stages that need workers and whose output does not exist yet."""
    if _untuned_roles(config, run):
        yield "sft"
    if not holds_model(run.student_directory):
        yield "distill"
    if find_lacking(config, run):
        yield "evaluate"


def _require_inputs(config: RunConfig, run: RunDirectory, work: Collection[str]) -> None:
    """Check that the inputs of every stage exist or are made by an earlier stage of this call.

    Raises: RunStateError, naming what is missing and the command that makes it.
    """
    untuned = _untuned_roles(config, run)
    if "distill" in work and "sft" not in work and untuned:
        raise RunStateError(
            f"distill starts from {sft_directory(run, untuned[0])}, which does not exist yet: run "
            "`distill-system sft` with the same configuration first, or `distill-system train`"
        )
    if "evaluate" in work and "distill" not in work and not holds_model(run.student_directory):
        raise RunStateError(
            f"evaluate needs the distilled student {run.student_directory}, which does not exist "
            "yet: run `distill-system distill` with the same configuration first"
        )


def _checkpointed(config: RunConfig, run: RunDirectory, work: Collection[str]) -> dict[str, int]:
    """The folders in which the stages of `work` keep their checkpoints -> the stage's steps."""
    found = {}
    if "sft" in work:
        settings = {"teacher": config.teacher.sft, "student": config.student.sft}
        roles = _untuned_roles(config, run)
        found = {f"sft_{role}": sft.steps for role in roles if (sft := settings[role])}
    return found | ({"distill": config.distill.steps} if "distill" in work else {})


def require_a_run(run: RunDirectory) -> None:
    """Refuse to report on a run that has not begun.  Raises: RunStateError."""
    if not run.config_path.exists():
        raise RunStateError(
            f"{run.path} holds no run to report on: check name and runs_directory, or run "
            "`distill-system train` with the same configuration first"
        )


def find_sets(config: RunConfig, run: RunDirectory, work: Collection[str]) -> list[SetName]:
    """The data sets that the stages of `work` read."""
    tuned: dict[str, SetName] = {"teacher": "teacher_sft", "student": "student_sft"}
    sets: list[SetName] = ["held_out", "evaluation"] if {"distill", "evaluate"} & {*work} else []
    if "distill" in work:
        sets.append("prompts")
        ready: dict[str, SetName] = {
            "dataset": "student_sft",
            "store": "stored",
            "preferences": "preferences",
        }
        sets += [ready[name] for name in config.distill.off_policy_mixture if name in ready]
        sets += ["plain_text"] if config.distill.plain_text_sequences else []
    if "sft" in work:
        sets += [tuned[role] for role in _untuned_roles(config, run) if tuned[role] not in sets]
    return sets


@contextmanager
def open_context(
    config: RunConfig,
    run: RunDirectory,
    *,
    resume: bool,
    sets: Collection[SetName] = ("prompts", "held_out", "evaluation"),
    stop: StopRequest | None = None,
) -> Iterator[RunContext]:
    """Everything a stage needs, for the length of a block; its workers end with the block.

    Models and data are checked before the cluster starts, so that mistakes show within seconds.
    """
    tokenizer = prepare_tokenizer(config, run)
    reads_store = "stored" in sets
    teacher = sample_origin(config, run, tokenizer, Author.TEACHER) if reads_store else None
    data = load_model_data(
        config,
        tokenizer,
        sets,
        stored_by=teacher,
        stop_token_ids=stop_token_ids(config, tokenizer),
    )
    check_data(config, data)
    check_evaluation(config.evaluation, data.evaluation, data.places)
    require_room(config, None if "held_out" in sets else ["learner"])
    require_machine(config)
    with ExitStack() as stack:
        stack.enter_context(_driver_log(config, run))
        view = stack.enter_context(LiveView(config.name))
        for line in [*settings_notes(config), *machine_notes(config)]:
            view.note(line)
        _note_rows(view, data)
        seconds = config.deadlines.call_seconds
        writes = stack.enter_context(RunWrites(view.note, seconds=seconds))
        log = stack.enter_context(
            MetricLog(
                run,
                run_name=config.name,
                trackers=config.trackers,
                notify=view.note,
                writes=writes,
            )
        )
        prompts = stack.enter_context(PromptLog(run, writes=writes))
        cluster = stack.enter_context(ClusterSession(config, notify=view.note, trains=True))
        gauges = stack.enter_context(RunGauges(config, report=run.report_path))
        log.add_tracker("Prometheus", gauges)
        view.listen(gauges.show_progress)
        view.listen(JobPage(config.name, run.report_path, notify=view.note).show_progress)
        yield RunContext(
            config=config,
            run=run,
            cluster=cluster,
            tokenizer=tokenizer,
            data=data,
            log=log,
            prompts=prompts,
            timings=Timings(run, writes=writes),
            writes=writes,
            view=view,
            resume=resume,
            stop=stop or StopRequest(),
        )


@contextmanager
def _driver_log(config: RunConfig, run: RunDirectory) -> Iterator[None]:
    """For the length of a block what is noted stands in the driver's log too, and how it failed."""
    logger, own = logging.getLogger(LOGGER_NAME), config.logging
    path = log_path(run.logs_directory, DRIVER)
    handler = open_log(path, level=own.level, json_lines=own.json_lines)
    try:
        logger.info("process %d begins on %s", os.getpid(), socket.gethostname())
        yield
    except KeyboardInterrupt:
        logger.warning("ended by a person")
        raise
    except DistillError as error:
        name_logs(error, run.logs_directory)
        logger.error("%s: %s", type(error).__name__, error)
        raise
    except Exception:
        logger.exception("ended by an error of its own")
        raise
    finally:
        close_log(handler)


def _run_sft(context: RunContext) -> None:
    roles = _untuned_roles(context.config, context.run)
    fine_tune(context, {role: getattr(context.data, f"{role}_sft") for role in roles})


def _run_distill(context: RunContext) -> None:
    with context.timings.stage("distill"):
        text = write_teacher_text(context, "distill")
        pools = open_pools(context, student_path=context.student_path)
        Driver(context, pools, context.data, teacher_text=text).run()


def _run_evaluate(context: RunContext) -> None:
    """Make the evaluations that are not there, and those that lack a metric, anew."""
    run, config = context.run, context.config
    students = {"before": context.student_path, "after": str(run.student_directory)}
    steps = {"before": 0, "after": find_steps(config, run)}
    lacking = find_lacking(config, run)
    if not lacking:
        return  # distillation has made them
    metrics = wanted_metrics(config, run)
    # The two students differ, so each gets pools of its own, one after the other.
    for label in [label for label in students if label in lacking] or ["after"]:
        again = "teacher" in find_lacking(config, run)  # the first of two students has made it

        def make(measuring: Measuring, label: str = label, again: bool = again) -> None:
            measuring.evaluate_teacher(again=again)
            if label in lacking:
                measuring.evaluate_student(label, step=steps[label])

        with context.timings.stage("evaluate"):
            text = write_teacher_text(context, "evaluate", metrics=metrics, again=again)
            measure_standing(
                context,
                make,
                student_path=students[label],
                step=steps[label],
                metrics=metrics,
                teacher_text=text.held_out,
            )
            context.cluster.stop_all()


def _untuned_roles(config: RunConfig, run: RunDirectory) -> list[str]:
    wanted = {"teacher": config.teacher.sft, "student": config.student.sft}
    return [
        role
        for role, sft in wanted.items()
        if sft is not None and not holds_model(sft_directory(run, role))
    ]


def _note_rows(view: LiveView, data: RunData) -> None:
    """Say what was read of each set, and what was left out."""
    for name, report in data.reports.items():
        view.note(f"data.{name}: {report.describe()}")
    for name, count in data.num_removed.items():
        if count:
            view.note(
                f"data.{name}: {count} rows left out, their prompts are in an evaluation split"
            )
    for name, count in data.num_out_of_bounds.items():
        view.note(f"data.{name}: {count} rows left out by the token bounds of their source")
    for line in data.notes:
        view.note(line)
    if data.num_foreign:
        view.note(
            f"data.trajectory_store: {data.num_foreign} rows left out, another model or sampling "
            "wrote them"
        )


_RUNNERS: dict[str, Callable[[RunContext], None]] = {
    "sft": _run_sft,
    "distill": _run_distill,
    "evaluate": _run_evaluate,
}
