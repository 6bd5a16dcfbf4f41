"""Sends a run to a cluster as a job.

A configuration in -> checked and planned here; then one resolved file of it and the package's
sources, which fit in 1 MiB, go to the cluster, and Ray runs `python -m distill_system` there.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import shlex
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import yaml

import distill_system
from distill_system.cluster.job_client import Job, JobOrder
from distill_system.config import RunConfig, dump_config, load_stages, planned_runs
from distill_system.errors import ConfigError, RunStateError
from distill_system.jobs.cluster_paths import write_out_paths
from distill_system.observe import RunDirectory

CONFIG_FILE = "run.json"

STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Seconds that Ray leaves a job between SIGTERM and SIGKILL; 3 where nothing is said."""

EXPORT_SECONDS = 30.0
"""Added to deadlines.stop_seconds: for the process to end once its checkpoint is written."""

_OURS = ("working_dir", "py_modules", "image_uri", "container")

_SECRET_WORDS = {"TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL", "CREDENTIALS"}

_FILE_OF_THIS_MACHINE = re.compile(
    r"\s*(?:(?:-[rce]|--(?:requirement|constraint|editable))[\s=]*+(?![/$]|[\w+]+://)|\.\.?/)"
)
"""A line of a requirements file that names another file by a relative path."""

Resume = Literal["no", "yes", "auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverResources:
    """What the driver's process reserves; with nothing Ray puts it on the head node.

    custom: amounts of custom resources, by name.
    """

    cpus: float = 0.0
    gpus: float = 0.0
    memory_gib: float = 0.0
    custom: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitRequest:
    """A run to send.

    package: "sent" sends this package's sources along; "installed" uses what the cluster has.
    image: a container image of the cluster's Ray with this package, for every process of the job.
    requirements: a pip requirements file, installed on every node before the job starts.
    runtime_environment: a YAML file of further fields of Ray's runtime_env.
    python: the interpreter in the cluster's environment.
    """

    config: RunConfig
    resume: Resume = "no"
    package: Literal["sent", "installed"] = "sent"
    image: str | None = None
    requirements: Path | None = None
    runtime_environment: Path | None = None
    python: str = "python"
    driver: DriverResources = DriverResources()
    device_gib: float = 80.0


class Jobs(Protocol):
    """The part of cluster.JobClient that is used here."""

    def submit(self, order: JobOrder) -> str:
        """Send a job; returns its submission id."""

    def jobs(self) -> list[Job]:
        """Every job that was submitted."""


def check(request: SubmitRequest, *, notify: Callable[[str], None]) -> SubmitRequest:
    """The request with every path written in full, once nothing is known that would stop it.

    Asks no cluster.
    Raises: ConfigError with every problem that was found.
    """
    _runtime_environment(request)  # its mistakes first: planning takes many seconds
    paths = write_out_paths(request.config)
    for line in paths.written_out:
        notify(line)
    if paths.absent:
        notify(
            f"not on this machine: {', '.join(paths.absent)}. Models and data are checked on the "
            "cluster, as the job starts"
        )
    else:
        _plan(paths.config, request.device_gib, notify)
    for stage in load_stages(paths.config):  # what is the run's own is written in full by now
        for line in write_out_paths(stage.config).written_out:
            raise ConfigError(f"curriculum, stage {stage.name!r}: {line}; write it so in the stage")
    return replace(request, config=paths.config)


def submit(request: SubmitRequest, jobs: Jobs) -> str:
    """Send a checked request; returns the job's submission id.

    Raises: RunStateError if a job of this run has not ended; ResourceError if it cannot be sent.
    """
    name = request.config.name
    for job in jobs.jobs():
        if job.run == name and not job.has_ended:
            raise RunStateError(
                f"the job {job.submission_id} of the run {name!r} is {job.status} there: wait, end "
                f"it with `distill-system stop {name}`, or give this run another name (--name)"
            )
    with TemporaryDirectory() as folder:
        environment = _runtime_environment(request)
        if request.image is None:
            _fill(Path(folder), request)
            environment["working_dir"] = folder
        return jobs.submit(_order(request, environment))


def write_folder(request: SubmitRequest, folder: Path) -> str:
    """Write what a checked request would send; returns the line with which Ray sends it.

    Raises: ConfigError if the folder holds something, or for a job in an image, which needs none.
    """
    if request.image is not None:
        raise ConfigError("--folder and --image: a job in an image is sent no files; give one")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"--folder {folder}: expected an empty folder, or none: all of it is sent"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _fill(folder, request)
    order = _order(request, _runtime_environment(request))
    options = {
        "--working-dir": str(folder),
        "--runtime-env-json": json.dumps(order.runtime_environment),
        "--metadata-json": json.dumps(dict(order.metadata)),
        "--entrypoint-num-cpus": order.num_cpus,
        "--entrypoint-num-gpus": order.num_gpus,
        "--entrypoint-memory": order.memory_bytes,
        "--entrypoint-resources": json.dumps(dict(order.resources)) if order.resources else "",
    }
    given = [text for name, value in options.items() if value for text in (name, str(value))]
    return f"{shlex.join(['ray', 'job', 'submit', *given, '--'])} {order.entrypoint}"


def _plan(config: RunConfig, device_gib: float, notify: Callable[[str], None]) -> None:
    # Imported here: it takes seconds, which a mistake in the request should not cost.
    from distill_system.stages.plan import plan_run

    problems: list[str] = []
    for run in planned_runs(config):
        planned = plan_run(run, device_gib=device_gib, on_this_machine=False)
        for line in planned.notes:
            notify(f"note: {line}")
        problems += planned.problems
        if planned.plan is not None and not planned.plan.fits:
            problems.append(
                f"the plan does not fit GPUs of {device_gib:g} GiB (--device-gib): "
                "`distill-system plan` shows what each worker holds"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def _order(request: SubmitRequest, environment: Mapping[str, Any]) -> JobOrder:
    config, driver = request.config, request.driver
    run = RunDirectory(Path(config.runs_directory) / config.name)
    return JobOrder(
        submission_id=f"{config.name}-{uuid.uuid4().hex[:8]}",
        entrypoint=entrypoint(request),
        runtime_environment=environment,
        metadata={
            "job_name": config.name,
            "run": config.name,
            "folder": str(run.path),
            "report": str(run.report_path),
            "steps": str(config.distill.steps),
            "distill_system": distill_system.__version__,
        },
        num_cpus=driver.cpus,
        num_gpus=driver.gpus,
        memory_bytes=round(driver.memory_gib * 2**30),
        resources=driver.custom,
    )


def entrypoint(request: SubmitRequest) -> str:
    """The driver's shell line."""
    resume = {"no": [], "yes": ["--resume"], "auto": ["--resume", "auto"]}[request.resume]
    file, before = CONFIG_FILE, ""
    if request.image is not None:  # Ray sends no files to a job that runs in an image
        file = f"/tmp/{request.config.name}-{CONFIG_FILE}"
        packed = base64.b64encode(gzip.compress(dump_config(request.config).encode())).decode()
        before = f"echo {packed} | base64 -d | gunzip > {shlex.quote(file)} && "
    command = shlex.join([request.python, "-m", "distill_system", "train", file, *resume])
    return f"{before}{command}"


def _fill(folder: Path, request: SubmitRequest) -> None:
    """Everything that travels: one configuration, and the package without its caches."""
    (folder / CONFIG_FILE).write_text(dump_config(request.config), encoding="utf-8")
    if request.package == "sent":
        source = Path(distill_system.__file__).parent
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(source, folder / source.name, ignore=ignored)


def _runtime_environment(request: SubmitRequest) -> dict[str, Any]:
    """Ray's runtime_env, without the folder that is sent.

    Raises: ConfigError for what cannot be combined or read.
    """
    environment = _read_environment(request.runtime_environment)
    if request.image is not None and (request.requirements is not None or "pip" in environment):
        raise ConfigError(
            "--image and pip exclude one another in Ray: install what is missing into the image"
        )
    if request.image is not None:
        environment["image_uri"] = request.image
    if request.requirements is not None:
        if not request.requirements.is_file():
            raise ConfigError(f"--pip {request.requirements}: expected a requirements file")
        _require_no_further_file(request.requirements)
        environment["pip"] = str(request.requirements)
    seconds = request.config.deadlines.stop_seconds + EXPORT_SECONDS
    environment["env_vars"] = {
        STOP_VARIABLE: str(math.ceil(seconds)),
        **environment.get("env_vars", {}),
    }
    return environment


def _require_no_further_file(requirements: Path) -> None:
    for row, line in enumerate(requirements.read_text(encoding="utf-8").splitlines(), start=1):
        if _FILE_OF_THIS_MACHINE.match(line):
            raise ConfigError(
                f"--pip {requirements}, line {row}: {line.strip()!r} names a file of this machine, "
                "and Ray sends the lines of this one alone: write its lines here, or name it by a "
                "full path that every node has"
            )


def _read_environment(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--runtime-env {file}: cannot be read: {error}") from error
    if not isinstance(form, dict):
        raise ConfigError(f"--runtime-env {file}: expected fields of Ray's runtime_env, got {form}")
    taken = [name for name in _OURS if name in form]
    if taken:
        raise ConfigError(
            f"--runtime-env {file}: {', '.join(taken)} is what this command fills in; an image is "
            "given by --image"
        )
    variables = form.get("env_vars", {})
    if not isinstance(variables, dict):
        raise ConfigError(f"--runtime-env {file}: env_vars: expected names and texts")
    secret = [name for name in variables if _SECRET_WORDS & {*str(name).upper().split("_")}]
    if secret:
        raise ConfigError(
            f"--runtime-env {file}: {', '.join(secret)} would stand in the clear in Ray's API and "
            "on its dashboard, for everybody who reaches them. Set it in the environment of every "
            "node before `ray start`, or as a secret of the pods"
        )
    return form
