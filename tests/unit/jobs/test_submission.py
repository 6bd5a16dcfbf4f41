"""What is sent to a cluster, and what is refused before anything is."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import distill_system
from distill_system.cluster.job_client import Job, JobOrder
from distill_system.config import load_config
from distill_system.errors import ConfigError, DataError, RunStateError
from distill_system.jobs.submission import (
    DriverResources,
    SubmitRequest,
    check,
    submit,
    write_folder,
)
from distill_system.run.preparation import open_run
from distill_system.stages.plan import plan_run


class FakeJobs:
    """Keeps the order, and what the folder held when it was sent."""

    def __init__(self, *known: Job) -> None:
        self.known = list(known)
        self.order: JobOrder | None = None
        self.files: dict[str, bytes] = {}

    def submit(self, order: JobOrder) -> str:
        self.order = order
        folder = order.runtime_environment.get("working_dir")
        if folder:
            found = [path for path in Path(folder).rglob("*") if path.is_file()]
            self.files = {str(p.relative_to(folder)): p.read_bytes() for p in found}
        return order.submission_id

    def jobs(self) -> list[Job]:
        return self.known


def _job(run: str, status: str) -> Job:
    return Job(
        submission_id=f"{run}-1",
        status=status,
        message="",
        metadata={"run": run},
        exit_code=None,
        started=0.0,
        ended=None,
    )


def test_a_run_travels_as_one_file_and_the_sources_of_the_package(configure) -> None:
    jobs = FakeJobs()
    request = SubmitRequest(config=configure("deadlines.stop_seconds=20.5"))
    submission_id = submit(request, jobs)
    sources = Path(distill_system.__file__).parent
    wanted = {str(p.relative_to(sources.parent)) for p in sources.rglob("*.py")}
    assert {name for name in jobs.files if name.endswith(".py")} == wanted
    others = {name for name in jobs.files if not name.endswith((".py", ".yaml", ".html", ".css"))}
    assert others <= {"run.json", "distill_system/py.typed"}
    assert sum(map(len, jobs.files.values())) < 2**21
    assert jobs.files["run.json"].decode().count("\n") > 50
    order = jobs.order
    assert order.entrypoint == "python -m distill_system train run.json"
    assert order.submission_id == submission_id
    assert re.fullmatch(r"run-[0-9a-f]{8}", submission_id)
    assert order.runtime_environment["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "51"}
    folder = f"{request.config.runs_directory}/run"
    assert {**order.metadata} | {"distill_system": ""} == {
        "job_name": "run",
        "run": "run",
        "folder": folder,
        "report": f"{folder}/report.html",
        "steps": "3",
        "distill_system": "",
    }


def test_the_file_that_travels_is_the_configuration_that_was_checked(configure, tmp_path) -> None:
    jobs = FakeJobs()
    request = SubmitRequest(config=configure("seed=7"))
    submit(request, jobs)
    (tmp_path / "run.json").write_bytes(jobs.files["run.json"])
    assert load_config([tmp_path / "run.json"]) == request.config


def test_what_a_driver_is_given_stands_in_the_order(configure) -> None:
    jobs = FakeJobs()
    request = SubmitRequest(
        config=configure(),
        resume="auto",
        python="/opt/python 3/bin/python",
        package="installed",
        driver=DriverResources(cpus=0.5, memory_gib=2.0, custom={"driver": 1.0}),
    )
    submit(request, jobs)
    order = jobs.order
    assert order.entrypoint.endswith(
        "'/opt/python 3/bin/python' -m distill_system train run.json --resume auto"
    )
    assert {*jobs.files} == {"run.json"}
    assert (order.num_cpus, order.memory_bytes, order.resources) == (0.5, 2**31, {"driver": 1.0})


def test_a_job_in_an_image_writes_its_configuration_from_its_own_line(configure, tmp_path) -> None:
    """Ray refuses files beside an image; the line is run here by the same shell."""
    jobs = FakeJobs()
    request = SubmitRequest(config=configure("seed=9"), image="registry/distill:1")
    submit(request, jobs)
    assert jobs.order.runtime_environment["image_uri"] == "registry/distill:1"
    assert "working_dir" not in jobs.order.runtime_environment
    line = jobs.order.entrypoint.replace("/tmp/run-run.json", str(tmp_path / "run-run.json"))
    line = line.replace("python -m distill_system", "echo")
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["train", str(tmp_path / "run-run.json")]
    assert load_config([tmp_path / "run-run.json"]) == request.config


def test_a_folder_holds_what_is_sent_and_the_line_is_rays_own(configure, tmp_path) -> None:
    """The line is read by the parser of `ray job submit`."""
    from ray.dashboard.modules.job.cli import submit as ray_submit

    request = SubmitRequest(config=configure(), resume="auto", driver=DriverResources(cpus=0.5))
    line = write_folder(request, tmp_path / "job")
    jobs = FakeJobs()
    submit(request, jobs)
    written = [path for path in (tmp_path / "job").rglob("*") if path.is_file()]
    assert {str(p.relative_to(tmp_path / "job")) for p in written} == {*jobs.files}
    assert line.startswith("ray job submit --working-dir ")
    read = ray_submit.make_context("submit", shlex.split(line)[3:]).params
    assert json.loads(read["runtime_env_json"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}
    assert json.loads(read["metadata_json"]) == jobs.order.metadata
    assert read["entrypoint_num_cpus"] == 0.5
    assert " ".join(read["entrypoint"]) == jobs.order.entrypoint
    with pytest.raises(ConfigError, match="expected an empty folder"):
        write_folder(request, tmp_path / "job")


def test_a_run_that_a_job_is_training_is_not_sent_twice(configure) -> None:
    request = SubmitRequest(config=configure())
    jobs = FakeJobs(_job("run", "FAILED"), _job("run", "RUNNING"), _job("other", "RUNNING"))
    with pytest.raises(RunStateError, match=r"the job run-1 of the run 'run' is RUNNING .*--name"):
        submit(request, jobs)
    assert jobs.order is None
    assert submit(replace(request, config=configure("name=third")), jobs).startswith("third-")


def test_every_problem_of_the_plan_is_told_before_anything_is_sent(configure) -> None:
    gone = "data.evaluation.test.path=gone.jsonl"
    with pytest.raises(ConfigError, match=r"128 tokens|max_position_embeddings"):
        check(SubmitRequest(config=configure("data.max_prompt_tokens=5000")), notify=print)
    said: list[str] = []
    check(SubmitRequest(config=configure(gone)), notify=said.append)
    assert said[0].startswith("not on this machine: data.evaluation.test.path=/")


def test_the_size_of_this_machine_is_not_the_clusters(configure) -> None:
    check(SubmitRequest(config=configure("pools.learner.cpus=64")), notify=print)


def test_trackers_are_asked_of_the_cluster_and_not_of_this_machine(configure, monkeypatch) -> None:
    """`--pip` or an image may bring them."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = configure("trackers=[wandb]")
    assert any("wandb not installed here" in p for p in plan_run(config, device_gib=80).problems)
    check(SubmitRequest(config=config), notify=print)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("env_vars: {HF_TOKEN: abc}", "HF_TOKEN would stand in the clear in Ray's API"),
        ("working_dir: .", "working_dir is what this command fills in"),
        ("[]", "expected fields of Ray's runtime_env"),
        ("env_vars: [a]", "env_vars: expected names and texts"),
        ("{", "cannot be read"),
    ],
)
def test_a_runtime_environment_that_cannot_be_sent_is_refused(
    configure, tmp_path, text, said
) -> None:
    (tmp_path / "env.yaml").write_text(text)
    request = SubmitRequest(config=configure(), runtime_environment=tmp_path / "env.yaml")
    with pytest.raises(ConfigError, match=re.escape(said)):
        check(request, notify=print)


@pytest.mark.parametrize(
    "line", ["-r more.txt", "-cpins.txt", "--requirement=more.txt", " -e .", "./own.whl", "../own"]
)
def test_a_requirement_that_would_stay_here_is_refused(configure, tmp_path, line: str) -> None:
    """Ray sends the lines of the file as they are, and pip runs on the nodes."""
    (tmp_path / "pip.txt").write_text(f"wandb<1\n{line}\n")
    request = SubmitRequest(config=configure(), requirements=tmp_path / "pip.txt")
    with pytest.raises(ConfigError, match=r"pip\.txt, line 2: .* names a file of this machine"):
        check(request, notify=print)


@pytest.mark.parametrize(
    "line",
    [
        "-r /shared/more.txt",
        "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/pins.txt",
        "--constraint=https://example.org/pins.txt",
        "-e git+https://example.org/own.git",
        "--extra-index-url https://example.org/simple",
        "# -r more.txt",
        "wandb<1",
    ],
)
def test_a_requirement_that_every_node_can_read_is_sent(configure, tmp_path, line: str) -> None:
    (tmp_path / "pip.txt").write_text(line)
    request = SubmitRequest(config=configure(), requirements=tmp_path / "pip.txt")
    assert str(tmp_path / "pip.txt") in write_folder(request, tmp_path / "job")


def test_further_fields_and_variables_are_passed_on(configure, tmp_path) -> None:
    (tmp_path / "env.yaml").write_text(
        "{env_vars: {TOKENIZERS_PARALLELISM: 'false'}, config: {setup_timeout_seconds: 60}}"
    )
    (tmp_path / "requirements.txt").write_text("sacrebleu\n")
    jobs = FakeJobs()
    request = SubmitRequest(
        config=configure(),
        runtime_environment=tmp_path / "env.yaml",
        requirements=tmp_path / "requirements.txt",
    )
    submit(request, jobs)
    environment = jobs.order.runtime_environment
    assert environment["env_vars"]["TOKENIZERS_PARALLELISM"] == "false"
    assert environment["config"] == {"setup_timeout_seconds": 60}
    assert environment["pip"] == str(tmp_path / "requirements.txt")
    with pytest.raises(ConfigError, match="exclude one another"):
        check(replace(request, image="x"), notify=print)


def test_a_relative_folder_of_runs_is_refused_in_a_job_and_for_one(configure, monkeypatch) -> None:
    config = configure("runs_directory=runs")
    with pytest.raises(ConfigError, match=r"runs_directory='runs'.*runs_directory=/shared/runs"):
        check(SubmitRequest(config=config), notify=print)
    open_run(config)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"a job runs in a folder that Ray makes"):
        open_run(config)
    assert open_run(configure()).path.is_absolute()


def test_paths_that_are_here_are_written_in_full(configure, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = Path(configure().teacher.path)
    (tmp_path / "mine").symlink_to(teacher)
    said: list[str] = []
    request = SubmitRequest(config=configure("data.directory=.", "teacher.path=mine"))
    config = check(request, notify=said.append).config
    assert config.data.directory == str(tmp_path)
    assert config.teacher.path == str(tmp_path / "mine")
    assert config.student == configure().student
    assert said[:2] == [
        f"data.directory: . is read on the cluster as {tmp_path}",
        f"teacher.path: mine is read on the cluster as {tmp_path / 'mine'}",
    ]


def test_names_of_a_hub_and_sets_of_the_package_stay_as_they_are() -> None:
    quickstart = Path(__file__).parents[3] / "configs/quickstart.yaml"
    sets = ("teacher_sft", "student_sft", "prompts", "held_out")
    few = [f"data.{name}.num_examples=64" for name in sets]
    config = load_config([quickstart], ["runs_directory=/shared/runs", *few])
    assert check(SubmitRequest(config=config), notify=print).config == config


def test_the_line_of_the_entrypoint_is_a_command_of_this_package() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill_system", "train", "none.json", "--resume", "auto"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 1
    assert "none.json: no such configuration file" in done.stderr
    assert json.dumps(done.stdout) == '""'


def test_data_errors_are_told_as_they_are(configure, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises((ConfigError, DataError), match=r"data\.prompts"):
        check(SubmitRequest(config=configure()), notify=print)
