"""The `distill-system` command.

Commands import what they need when they run: importing vLLM, Ray and torch takes many seconds,
which `--help` and a mistake in a configuration should not cost.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperCommand

from distill_system.errors import ConfigError, DistillError
from distill_system.job_process import is_job
from distill_system.stopping import StopRequest

if TYPE_CHECKING:
    from distill_system.cluster.job_client import JobClient
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

ResumeChoice = Literal["no", "yes", "auto"]

Resume = Annotated[
    ResumeChoice,
    typer.Option(
        "--resume",
        metavar="[auto]",
        help="Go on with an unfinished run from its newest checkpoint; auto: begin where there is "
        "no such run.",
        show_default=False,
    ),
]


class _Resuming(TyperCommand):
    """A command whose --resume stands alone or is followed by auto."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        whole: list[str] = []
        for at, argument in enumerate(args):
            whole.append(argument)
            if argument == "--resume" and args[at + 1 : at + 2] not in (["auto"], ["no"], ["yes"]):
                whole.append("yes")
        return super().parse_args(ctx, whole)


Objective = Annotated[
    str | None,
    typer.Option(help="A method of the field by name, such as gkd, or a YAML file of one."),
]

DeviceGib = Annotated[float, typer.Option(min=1.0, help="Memory of each GPU.")]


@app.command(cls=_Resuming)
def train(settings: Settings, resume: Resume = "no", objective: Objective = None) -> None:
    """Fine-tune both models, distil, evaluate, report, push; finished stages are skipped."""
    stages = ("sft", "distill", "evaluate", "report", "push")
    _run("train", settings, resume=resume, stages=stages, objective=objective)


@app.command(cls=_Resuming)
def sft(settings: Settings, resume: Resume = "no") -> None:
    """Supervised fine-tuning of teacher and student alone."""
    _run("sft", settings, resume=resume, stages=("sft",))


@app.command(cls=_Resuming)
def distill(settings: Settings, resume: Resume = "no") -> None:
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
def select(
    settings: Settings,
    reference: Annotated[
        str, typer.Option(help="Folder or hub name of a smaller model of the teacher's tokenizer.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the scores and of the rows that are kept.")],
    rows: Annotated[
        Literal["plain_text", "student_sft", "teacher_sft"] | None,
        typer.Option("--set", help="Rows to choose from; without it the first that is given."),
    ] = None,
    keep: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the rows kept.")] = 0.5,
    at_least: Annotated[
        float | None, typer.Option(help="Keep by score, nats per token, in place of a share.")
    ] = None,
) -> None:
    """Keep the rows that the teacher knows better than a reference, ahead of the runs that learn.

    The same command goes on where an earlier one was ended.
    """
    with _reporting_errors(), _ending_on_signals("the same command goes on, scores are kept"):
        from distill_system.config import load_config
        from distill_system.offline.select import SelectRequest, describe
        from distill_system.offline.select import select as select_rows

        request = SelectRequest(
            config=load_config(*_sort(settings)),
            reference=reference,
            out=out,
            rows=rows,
            keep=keep,
            at_least=at_least,
        )
        selection = select_rows(request)
    print(describe(selection))
    print(f"kept: {selection.path}")


@app.command()
def cut(
    settings: Settings,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks that are kept.")] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1, help="Units of the stream.")] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(min=1, help="Neurons of each MLP.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads of each block.")] = None,
    key_value_heads: Annotated[
        int | None, typer.Option(min=1, help="Key heads; without it as many queries share one.")
    ] = None,
    blocks: Annotated[
        Literal["even", "important"], typer.Option(help="Which blocks are kept.")
    ] = "even",
    rows: Annotated[int, typer.Option(min=1, help="Rows of data.student_sft to read.")] = 128,
) -> None:
    """Cut the student out of the teacher: student.path is written."""
    with _reporting_errors():
        from distill_system.config import load_config
        from distill_system.cutting import CutRequest, cut_student

        request = CutRequest(
            config=load_config(*_sort(settings)),
            num_layers=layers,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_heads=heads,
            num_key_value_heads=key_value_heads,
            blocks=blocks,
            num_rows=rows,
        )
        report = cut_student(request)
    before, after = report.parameters
    print(f"{before:.1f} -> {after:.1f} million parameters: {report.folder}")
    if report.losses is not None:
        teacher, student = report.losses
        print(f"cross-entropy of the rows: teacher {teacher:.3f}, student {student:.3f} nats")


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


def _list(joined: str) -> list[str]:
    return [name.strip() for name in joined.split(",") if name.strip()]


@app.command()
def compare(
    settings: Settings,
    objectives: Annotated[
        str, typer.Option(help="Methods by name, or YAML files of them, joined by commas.")
    ] = "",
    teachers: Annotated[
        str,
        typer.Option(help="Compare teachers instead: their folders or hub names, by commas."),
    ] = "",
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
            objectives=_list(objectives),
            teachers=_list(teachers),
            seeds=seeds,
            budget=budget,
            budget_value=budget_value,
            at_once=at_once,
        )
        compare(request, notify=print)


Address = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, http://HEAD:8265; without it RAY_API_SERVER_ADDRESS."
    ),
]


@app.command(cls=_Resuming)
def submit(
    settings: Settings,
    address: Address = None,
    name: Annotated[str | None, typer.Option(help="The run's name, in place of CONFIG's.")] = None,
    resume: Resume = "no",
    wait: Annotated[
        bool, typer.Option("--wait", help="Until it has ended; its exit code is this command's.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show what it writes, and wait for its end.")
    ] = False,
    image: Annotated[
        str | None, typer.Option(help="Container image with the package, for the job's processes.")
    ] = None,
    pip: Annotated[
        Path | None, typer.Option(help="Requirements file that Ray installs for the job.")
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(help="YAML file of further fields of Ray's runtime_env.")
    ] = None,
    package: Annotated[
        Literal["sent", "installed"],
        typer.Option(help="Send this package's sources along, or use what the cluster has."),
    ] = "sent",
    python: Annotated[str, typer.Option(help="The interpreter on the cluster.")] = "python",
    driver_cpus: Annotated[float, typer.Option(min=0.0, help="CPUs of the driver itself.")] = 0.0,
    driver_gpus: Annotated[float, typer.Option(min=0.0, help="GPUs of the driver itself.")] = 0.0,
    driver_memory_gib: Annotated[
        float, typer.Option(min=0.0, help="Memory of the driver itself.")
    ] = 0.0,
    driver_resource: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=AMOUNT", help="A custom resource of the driver itself."),
    ] = None,
    device_gib: DeviceGib = 80.0,
    folder: Annotated[
        Path | None,
        typer.Option(help="Write what would be sent there, and print Ray's own line; ask nobody."),
    ] = None,
    objective: Objective = None,
) -> None:
    """Send a run to a Ray cluster as a job, once it is checked and planned here."""
    with _reporting_errors():
        named = [] if name is None else [f"name={name}"]
        config = _load([*settings, *named], objective)
        from distill_system.cluster.job_client import JobClient
        from distill_system.jobs import submission

        # Asked first: planning takes longer.
        jobs = JobClient(address) if folder is None else None
        driver = submission.DriverResources(
            cpus=driver_cpus,
            gpus=driver_gpus,
            memory_gib=driver_memory_gib,
            custom=_amounts("--driver-resource", driver_resource, form="NAME=AMOUNT"),
        )
        request = submission.SubmitRequest(
            config=config,
            resume=resume,
            package=package,
            image=image,
            requirements=pip,
            runtime_environment=runtime_env,
            python=python,
            driver=driver,
            device_gib=device_gib,
        )
        checked = submission.check(request, notify=print)
        if folder is not None:
            print(submission.write_folder(checked, folder))
        if jobs is None:
            return
        submission_id = submission.submit(checked, jobs)
        print(f"submitted: {submission_id} to {jobs.address}")
        if not (wait or follow):
            print(f"next: distill-system logs {config.name} --follow --address {jobs.address}")
            return
        _end_with(jobs, submission_id, follow=follow)


def _end_with(jobs: JobClient, submission_id: str, *, follow: bool) -> None:
    """Wait for a job and end with its exit code; Ctrl-C ends the wait alone."""
    from distill_system.jobs import watching

    write = _write_out if follow else None
    try:
        job = watching.wait_until_ended(jobs, submission_id, write=write, notify=print)
    except KeyboardInterrupt:
        line = f"distill-system stop {submission_id} --address {jobs.address}"
        print(f"\nthe job {submission_id} goes on; it is ended by: {line}", file=sys.stderr)
        raise typer.Exit(130) from None
    if job.status != "SUCCEEDED":
        _print_error(job.status, f"{submission_id}: {watching.cause(job)}")
    raise typer.Exit(watching.exit_code(job))


def _write_out(text: str) -> None:
    print(text, end="", flush=True)


RunName = Annotated[str, typer.Argument(help="The run's name, its folder, or its job's id.")]

RunsDirectory = Annotated[str, typer.Option(help="Where a run's name is looked for.")]

Wait = Annotated[float, typer.Option(min=0.0, help="Longest wait for it, in seconds.")]


@app.command()
def status(
    run: Annotated[
        str | None, typer.Argument(help="The run's name, its folder, or its job's id.")
    ] = None,
    address: Address = None,
    runs_directory: RunsDirectory = "runs",
) -> None:
    """Say how jobs of a cluster stand; without an address, how runs do, by their folders alone."""
    with _reporting_errors():
        from distill_system.jobs import folders

        if _asks_a_cluster(address):
            from distill_system.cluster.job_client import JobClient
            from distill_system.jobs import watching

            jobs = JobClient(address)
            known = jobs.jobs() if run is None else [jobs.find(run)]
            lines = list(watching.describe(known, now=time.time()))
            if run is not None:
                lines += folders.describe_if_here(known[0].metadata.get("folder"))
        else:
            lines = list(folders.describe(run, runs_directory))
    print("\n".join(lines))


@app.command()
def logs(
    run: RunName,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until the job has ended; its exit code.")
    ] = False,
    worker: Annotated[
        str, typer.Option(help="Whose log of the run's folder, such as student_rollout-0.")
    ] = "driver",
    runs_directory: RunsDirectory = "runs",
) -> None:
    """Show what a job's driver has written; without an address, a log of the run's folder."""
    with _reporting_errors():
        if not _asks_a_cluster(address):
            from distill_system.jobs import folders

            if follow:
                raise ConfigError("--follow is for the job of a cluster: give --address")
            _write_out(folders.read_log(run, worker, runs_directory))
            return
        from distill_system.cluster.job_client import JobClient

        jobs = JobClient(address)
        job = jobs.find(run)
        if follow:
            _end_with(jobs, job.submission_id, follow=True)
        _write_out(jobs.log(job.submission_id))


@app.command()
def stop(
    run: RunName,
    address: Address = None,
    wait: Wait = 120.0,
    runs_directory: RunsDirectory = "runs",
) -> None:
    """End a run by SIGTERM: the step under way, a checkpoint of it, then its workers.

    With an address the job of that run; without one the process of this machine that trains it.
    """
    with _reporting_errors():
        if not _asks_a_cluster(address):
            from distill_system.jobs import folders

            print(folders.stop(run, runs_directory, seconds=wait))
            return
        from distill_system.cluster.job_client import JobClient
        from distill_system.jobs import watching

        jobs = JobClient(address)
        job = jobs.find(run)
        if not job.has_ended:
            jobs.stop(job.submission_id)
            job = watching.wait_until_ended(jobs, job.submission_id, notify=print, seconds=wait)
        print(f"{job.submission_id} is {job.status}")


def _asks_a_cluster(address: str | None) -> bool:
    """Whether a command about a run asks the jobs of a cluster, and not the run's folder."""
    return bool(address or os.environ.get("RAY_API_SERVER_ADDRESS"))


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
    wait: Wait = 120.0,
    runs_directory: RunsDirectory = "runs",
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
    device_gib: DeviceGib = 80.0,
    objective: Objective = None,
) -> None:
    """Read models, data and chat template, predict memory and bytes; nothing is started.

    Exit code 1 if something would stop the run: every problem is told, not the first alone.
    """
    with _reporting_errors():
        config = _load(settings, objective)
        from distill_system.config import planned_runs
        from distill_system.planning import render_plan
        from distill_system.stages.plan import plan_run

        each = [plan_run(run, device_gib=device_gib) for run in planned_runs(config)]
    for planned in each:
        if planned.plan is not None:
            Console().print(render_plan(planned.plan))
        for line in planned.notes:
            print(f"note: {line}")
        for line in planned.problems:
            _print_error("Problem", line)
    can_start = all(planned.can_start for planned in each)
    if can_start:
        print("nothing was found that would stop this run")
    raise typer.Exit(int(not can_start))


@app.command()
def manifests(
    settings: Settings,
    image: Annotated[
        str, typer.Option(help="Image that deploy/Dockerfile builds, as the cluster pulls it.")
    ],
    storage_claim: Annotated[
        str, typer.Option(help="PersistentVolumeClaim that all pods may write (ReadWriteMany).")
    ],
    mount_path: Annotated[str, typer.Option(help="Where pods see it.")] = "/shared",
    namespace: Annotated[str, typer.Option(help="Kubernetes namespace.")] = "default",
    kind: Annotated[
        Literal["job", "cluster"],
        typer.Option(help="A cluster for this run that ends with it, or one that stays."),
    ] = "job",
    retries: Annotated[
        int, typer.Option(min=0, help="New clusters for a run that failed; each resumes.")
    ] = 2,
    secret: Annotated[
        list[str] | None,
        typer.Option(help="Secret whose keys every worker has in its environment; may repeat."),
    ] = None,
    token_secret: Annotated[
        str | None, typer.Option(help="Secret with the cluster's token; else KubeRay makes one.")
    ] = None,
    redis: Annotated[
        str | None, typer.Option(help="Address of a Redis that outlives Ray's head: HOST:PORT.")
    ] = None,
    redis_secret: Annotated[
        str | None, typer.Option(help="Secret with its password, under the key password.")
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(metavar="POOL=GIB", help="Memory of a pool's pods; else the plan's."),
    ] = None,
    workers_per_pod: Annotated[
        list[str] | None,
        typer.Option(metavar="POOL=COUNT", help="Workers of a pool that stand in one pod."),
    ] = None,
    head_memory: Annotated[
        float, typer.Option(min=1.0, help="GiB of the pod with Ray's head and the driver.")
    ] = 8.0,
    device_gib: DeviceGib = 80.0,
    objective: Objective = None,
) -> None:
    """Print the Kubernetes objects that run this configuration on KubeRay; nothing is started.

    A worker group for each pool, with the CPUs, GPUs and memory that its workers need.
    """
    with _reporting_errors():
        from distill_system.manifests import ManifestRequest
        from distill_system.stages.manifests import render_manifests

        text = render_manifests(
            _load(settings, objective),
            ManifestRequest(
                image=image,
                storage_claim=storage_claim,
                mount_path=mount_path,
                namespace=namespace,
                kind=kind,
                retries=retries,
                secrets=tuple(secret or ()),
                token_secret=token_secret,
                redis_address=redis,
                redis_secret=redis_secret,
                head_memory_gib=head_memory,
            ),
            memory_gib=_amounts("--memory", memory),
            workers_per_pod={
                name: int(count)
                for name, count in _amounts("--workers-per-pod", workers_per_pod).items()
            },
            device_gib=device_gib,
        )
    print(text, end="")


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
        from distill_system.config import load_config, planned_runs

        config = load_config(*_sort(settings))
        from distill_system.stages.data_page import render_data
        from distill_system.stages.show_data import show_data

        console, has_problem = Console(), False
        plain = not console.is_terminal
        for run in planned_runs(config):
            if config.curriculum:
                console.print(f"[bold]stage {run.name}[/]")
            found = show_data(run, names=set_names or (), num_rows=rows)
            # Elsewhere a line is as long as its row: whoever reads a file wraps it himself.
            console.print(render_data(found, run, plain=plain), soft_wrap=plain)
            has_problem = has_problem or any(each.problem is not None for each in found)
    raise typer.Exit(int(has_problem))


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
    resume: ResumeChoice = "no",
    stages: tuple[str, ...],
    objective: str | None = None,
) -> None:
    """Load the configuration and run the stages of a command."""
    stop = StopRequest()
    with _reporting_errors(), _ending_on_signals(_resume_line(command, settings, objective), stop):
        config = _load(settings, objective)
        # After the configuration is checked: this import is the slow one.
        from distill_system.stages.curriculum import train_all

        chosen: bool | Literal["auto"] = "auto" if resume == "auto" else resume == "yes"
        run = train_all(config, resume=chosen, stages=stages, stop=stop)
    if "report" in stages:
        print(f"report: {run.report_path}\nsummary: {run.summary_path}")
    else:
        print(f"run: {run.path}")


def _resume_line(command: str, settings: list[str], objective: str | None) -> str:
    """How a run goes on that is ended now, as a command line."""
    method = [] if objective is None else ["--objective", objective]
    if is_job():
        return "submit it again with --resume auto, and it goes on from its newest checkpoint"
    if command not in ("train", "sft", "distill"):
        return "the same command begins again"
    line = shlex.join(["distill-system", command, *settings, *method, "--resume", "auto"])
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


def _amounts(
    option: str, given: list[str] | None, *, form: str = "POOL=NUMBER, such as learner=8"
) -> dict[str, float]:
    """The amounts that an option gives by name.

    Raises: ConfigError for what is no NAME=NUMBER above 0.
    """
    amounts = {}
    for text in given or ():
        name, _, amount = text.partition("=")
        try:
            amounts[name] = float(amount)
        except ValueError:
            amounts[name] = 0.0
        if not name or not 0.0 < amounts[name] < math.inf:
            raise ConfigError(f"{option} {text}: expected {form}")
    return amounts


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
