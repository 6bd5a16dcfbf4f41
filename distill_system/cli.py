"""The `distill-system` command.

Commands import what they need when they run: importing vLLM, Ray and torch takes many seconds,
which `--help` and a mistake in a configuration should not cost.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from distill_system.errors import ConfigError, DistillError
from distill_system.stopping import StopRequest

if TYPE_CHECKING:
    from distill_system.config import RunConfig

app = typer.Typer(
    help="Distil a large language model into a small one by adversarial moment matching.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Settings = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG [CONFIG...] [key.sub=value...]",
        help="YAML files, later ones win, then single keys.",
        show_default=False,
    ),
]

Resume = Annotated[
    bool, typer.Option("--resume", help="Continue unfinished stages from their newest checkpoint.")
]

Objective = Annotated[
    str | None,
    typer.Option(help="A method of the field by name, such as gkd, or a YAML file of one."),
]


@app.command()
def train(settings: Settings, resume: Resume = False, objective: Objective = None) -> None:
    """Fine-tune both models, distil, evaluate, report, push; finished stages are skipped."""
    stages = ("sft", "distill", "evaluate", "report", "push")
    _run("train", settings, resume=resume, stages=stages, objective=objective)


@app.command()
def sft(settings: Settings, resume: Resume = False) -> None:
    """Supervised fine-tuning of teacher and student alone."""
    _run("sft", settings, resume=resume, stages=("sft",))


@app.command()
def distill(settings: Settings, resume: Resume = False) -> None:
    """Distillation alone; the models that it starts from must exist."""
    _run("distill", settings, resume=resume, stages=("distill",))


@app.command()
def generate(
    settings: Settings,
    author: Annotated[
        Literal["teacher", "student"], typer.Option(help="Which model writes.")
    ] = "teacher",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the store; without it data.trajectory_store.")
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts of data.prompts; without it all.")
    ] = None,
    samples_per_prompt: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 1,
    cache_targets: Annotated[
        bool, typer.Option("--cache-targets", help="Keep what the teacher says of them, too.")
    ] = False,
) -> None:
    """Write samples into a trajectory store, ahead of the runs that learn from them.

    The same command goes on where an earlier one was ended.
    """
    files, overrides = _sort(settings)
    again = "the same command goes on, what was finished is kept"
    with _reporting_errors(), _ending_on_signals(again):
        from distill_system.config import load_config
        from distill_system.offline.generate import GenerateRequest
        from distill_system.offline.generate import generate as fill_store
        from distill_system.records import Author

        request = GenerateRequest(
            config=load_config(files, overrides),
            author=Author(author),
            out=out,
            num_prompts=num_prompts,
            samples_per_prompt=samples_per_prompt,
            cache_targets=cache_targets,
        )
        folder = fill_store(request)
    print(f"store: {folder}")


@app.command()
def evaluate(
    settings: Settings,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of any model, or a run's folder for its student."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the scores of --model; else in the run's folder.")
    ] = None,
) -> None:
    """Evaluate a run's students where evaluation.metrics asks for more than stands there.

    With --model: evaluate that model on data.evaluation, and nothing else.
    """
    if model is None:
        _run("evaluate", settings, stages=("evaluate", "report"))
        return
    with _reporting_errors(), _ending_on_signals("the same command begins again"):
        from distill_system.config import load_config

        config = load_config(*_sort(settings))
        from distill_system.stages.evaluate_model import evaluate_model, render_scores

        evaluated = evaluate_model(config, model, out=out)
    Console().print(render_scores(evaluated))


@app.command()
def report(settings: Settings) -> None:
    """Write summary.json and report.html anew from what the run has recorded."""
    _run("report", settings, stages=("report",))


@app.command()
def compare(
    settings: Settings,
    objectives: Annotated[
        str, typer.Option(help="Methods by name, or YAML files of them, joined by commas.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each objective: seeds 0, 1, ...")] = 3,
    budget: Annotated[
        Literal["updates", "sampled_tokens", "seconds"],
        typer.Option(help="What every objective gets as much of."),
    ] = "updates",
    budget_value: Annotated[
        float | None,
        typer.Option(help="How much; without it, what CONFIG's steps cost the first one."),
    ] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
) -> None:
    """Train every objective from one start on equal budgets; write compare.json and tables.

    The same command goes on where an earlier one was ended.
    """
    with _reporting_errors(), _ending_on_signals():
        from distill_system.stages.compare import ComparisonRequest, compare

        files, overrides = _sort(settings)
        request = ComparisonRequest(
            paths=files,
            overrides=overrides,
            objectives=[name.strip() for name in objectives.split(",") if name.strip()],
            seeds=seeds,
            budget=budget,
            budget_value=budget_value,
            at_once=at_once,
        )
        compare(request, notify=print)


@app.command()
def scale(
    run: Annotated[str, typer.Argument(help="The run's folder, or its name.")],
    sizes: Annotated[
        list[str],
        typer.Argument(
            metavar="POOL=COUNT...",
            help="Such as student_rollout=4 teacher_scoring=2, within min_count and max_count.",
        ),
    ],
    wait: Annotated[float, typer.Option(min=0.0, help="Longest wait for it, in seconds.")] = 120.0,
    runs_directory: Annotated[str, typer.Option(help="Where a run's name is looked for.")] = "runs",
) -> None:
    """Change the number of a run's workers while it distils; waits until they are there."""
    with _reporting_errors():
        from distill_system.elastic.scale_command import describe
        from distill_system.elastic.scale_command import scale as ask

        pools = ask(run, sizes, runs_directory=runs_directory, wait_seconds=wait, notify=print)
        print("\n".join(describe(pools)))


@app.command()
def init(
    teacher: Annotated[str, typer.Argument(help="Folder or hub name of the teacher.")],
    student: Annotated[str, typer.Argument(help="Folder or hub name of the student.")],
    data: Annotated[Path, typer.Argument(help="Rows to learn from: a file or a folder.")],
    output: Annotated[Path, typer.Option(help="The file to write; its name is the run's.")] = Path(
        "mine.yaml"
    ),
) -> None:
    """Write a commented configuration that fits two models, a file of rows and this machine."""
    with _reporting_errors():
        if output.exists():
            raise ConfigError(f"--output {output}: there is such a file; give another name")
        from distill_system.config import load_config
        from distill_system.stages.new_configuration import name_of, new_configuration
        from distill_system.stages.plan import plan_run

        text = new_configuration(teacher, student, data, name=name_of(output))
        output.write_text(text, encoding="utf-8")
        planned = plan_run(load_config([output]), device_gib=80.0)
    print(f"written: {output}")
    for line in planned.problems:
        _print_error("Problem", line)
    if planned.can_start:
        print(f"next: distill-system plan {output}, then distill-system train {output}")
    raise typer.Exit(int(not planned.can_start))


@app.command()
def plan(
    settings: Settings,
    device_gib: Annotated[float, typer.Option(min=1.0, help="Memory of each GPU.")] = 80.0,
    objective: Objective = None,
) -> None:
    """Read models, data and chat template, predict memory and bytes; nothing is started.

    Exit code 1 if something would stop the run: every problem is told, not the first alone.
    """
    with _reporting_errors():
        config = _load(settings, objective)
        from distill_system.planning import render_plan
        from distill_system.stages.plan import plan_run

        planned = plan_run(config, device_gib=device_gib)
    if planned.plan is not None:
        Console().print(render_plan(planned.plan))
    for line in planned.notes:
        print(f"note: {line}")
    for line in planned.problems:
        _print_error("Problem", line)
    if planned.can_start:
        print("nothing was found that would stop this run")
    raise typer.Exit(int(not planned.can_start))


@app.command()
def data(
    settings: Settings,
    set_names: Annotated[
        list[str] | None,
        typer.Option("--set", help="Only this set, such as prompts or evaluation.test."),
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows of each set that are shown.")] = 10,
) -> None:
    """Show the run's data as the models will read it; nothing is started or written.

    Exit code 1 if a set would end the run.
    """
    with _reporting_errors():
        from distill_system.config import load_config

        config = load_config(*_sort(settings))
        from distill_system.stages.data_page import render_data
        from distill_system.stages.show_data import show_data

        found = show_data(config, names=set_names or (), num_rows=rows)
        console = Console()
        plain = not console.is_terminal
        # Elsewhere a line is as long as its row: whoever reads a file wraps it himself.
        page = render_data(found, config, plain=plain)
        console.print(page, soft_wrap=plain)
    raise typer.Exit(int(any(each.problem is not None for each in found)))


@app.command()
def doctor() -> None:
    """Say what is installed, what fits together, what hardware there is, and what to mend."""
    from distill_system.doctor import diagnose, exit_code, render

    findings = diagnose()
    Console().print(render(findings))
    raise typer.Exit(exit_code(findings))


def _run(
    command: str,
    settings: list[str],
    *,
    resume: bool = False,
    stages: tuple[str, ...],
    objective: str | None = None,
) -> None:
    """Load the configuration and run the stages of a command."""
    stop = StopRequest()
    with _reporting_errors(), _ending_on_signals(_resume_line(command, settings, objective), stop):
        config = _load(settings, objective)
        # After the configuration is checked: this import is the slow one.
        from distill_system.stages.train import train as run_stages

        run = run_stages(config, resume=resume, stages=stages, stop=stop)
    if "report" in stages:
        print(f"report: {run.report_path}\nsummary: {run.summary_path}")
    else:
        print(f"run: {run.path}")


def _resume_line(command: str, settings: list[str], objective: str | None) -> str:
    """How a run goes on that is ended now, as a command line."""
    method = [] if objective is None else ["--objective", objective]
    if command not in ("train", "sft", "distill"):
        return "the same command begins again"
    line = shlex.join(["distill-system", command, *settings, *method, "--resume"])
    return f"go on from the newest checkpoint (from the start where there is none) with: {line}"


def _load(settings: list[str], objective: str | None = None) -> RunConfig:
    """The configuration of a command line, with a method's recipe over its files."""
    from distill_system.config import load_config
    from distill_system.config.recipes import recipe_path

    files, overrides = _sort(settings)
    recipe = [] if objective is None else [str(recipe_path(objective))]
    return load_config([*files, *recipe], overrides)


def _sort(settings: list[str]) -> tuple[list[str], list[str]]:
    """The files and the overrides of a command line."""
    files = [setting for setting in settings if not _is_override(setting)]
    return files, [setting for setting in settings if _is_override(setting)]


_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_WAY_OUT = (
    "Make room on the disk, or mend the permissions of what is named here; --resume then continues "
    "a run from its newest checkpoint"
)


@contextmanager
def _reporting_errors() -> Iterator[None]:
    """Turn a DistillError, or an error of the file system, into one message and exit code 1."""
    try:
        yield
    except DistillError as error:
        _print_error(type(error).__name__, str(error))
        raise typer.Exit(1) from None
    except OSError as error:  # a full disk, a folder that may not be written, an unreadable file
        way_out = _WAY_OUT if error.errno in _OF_THE_DISK else "See that this path is right"
        _print_error(type(error).__name__, f"{error}. {way_out}")
        raise typer.Exit(1) from None


@contextmanager
def _ending_on_signals(
    again: str = "--resume continues from the newest checkpoint",
    stop: StopRequest | None = None,
) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt in the block, so that it ends its workers.

    A second signal ends this process at once; Ray's processes notice that and end themselves.

    again: how to continue, for the message.
    stop: asked first; where somebody hears it, the block itself ends once a checkpoint is written.
    """
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for caught in before:
            signal.signal(caught, signal.SIG_DFL)  # for the second signal
        seconds = None if stop is None else stop.make()
        if seconds is None:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        said = f"{name}: a checkpoint is written after this step, within {seconds:g} s"
        # Not by print: the signal may have come in the middle of one.
        os.write(2, f"{said} (deadlines.stop_seconds); a second one ends at once\n".encode())

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (KeyboardInterrupt, DistillError) as error:
        # Where the signal went to the workers too, what the run meets is their end.
        if not received:
            raise
        name = signal.Signals(received[0]).name
        _print_error("Interrupted", f"by {name}; {_without_checkpoint(error)}{again}")
        raise typer.Exit(128 + received[0]) from None
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


def _without_checkpoint(error: BaseException) -> str:
    """What an interrupted run could not finish, for the message."""
    if not isinstance(error, DistillError):
        return ""
    return f"the step under way could not be finished ({str(error).splitlines()[0]}); "


def _print_error(title: str, message: str) -> None:
    # The message by plain print: rich would wrap it and read [brackets] in it as markup.
    Console(stderr=True).print(f"[bold red]{title}[/]: ", end="")
    print(message, file=sys.stderr)


def _is_override(setting: str) -> bool:
    if setting.endswith((".yaml", ".yml")):
        # A file may have a name such as lr=0.1.yaml, and an override the path of a YAML file.
        return bool(re.match(r"[A-Za-z_][\w.]*=", setting)) and not os.path.exists(setting)
    return "=" in setting


def main() -> None:
    """Entry point of the `distill-system` command."""
    app()
