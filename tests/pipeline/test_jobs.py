"""A run as a job of a real cluster that asks for a token: sent, watched, stopped, gone on with."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
from pipeline.command_line import MARK, write_configuration
from pipeline.exposure import SECRETS, files_with_secrets, planted

START_SECONDS = 150.0
COMMAND_SECONDS = 400.0


class Cluster:
    """A head node with its dashboard, in a process group and on ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.token = SECRETS["RAY_AUTH_TOKEN"]
        token = folder / "token"
        token.write_text(self.token)
        self.mark = secrets.token_hex(8)
        self.port, self.dashboard, self.client, *others = _free_ports(6)
        self.address = f"http://127.0.0.1:{self.dashboard}"
        # As an activated environment has it, in which a person runs `ray start`.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        hidden = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PYTHONPATH")
        self.environment = {k: v for k, v in os.environ.items() if k not in hidden} | {
            "PATH": path,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "OMP_NUM_THREADS": "1",
            # Where security.md tells people to put them, and where they must stay.
            "HF_TOKEN": SECRETS["HF_TOKEN"],
            "WANDB_API_KEY": SECRETS["WANDB_API_KEY"],
        }
        names = ("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export")
        flags = [f"--{name}-port={port}" for name, port in zip(names, others, strict=True)]
        self.folder = folder
        self.log = (folder / "head.log").open("w")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *(f"--port={self.port}", f"--dashboard-port={self.dashboard}", *flags),
                f"--ray-client-server-port={self.client}",
                *("--dashboard-host=127.0.0.1", "--num-cpus=2", "--disable-usage-stats"),
                *(f"--temp-dir={folder / 'ray'}", "--object-store-memory=100000000"),
            ],
            env={**self.environment, MARK: self.mark},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(lambda: _accepts(self.dashboard), START_SECONDS)
        except AssertionError:
            self.end()
            raise

    def command(self, *arguments: object, code: int = 0, **environment: str) -> str:
        """What a command of ours writes to both of its streams; it must end with this code."""
        done = subprocess.run(
            [sys.executable, "-m", "distill_system", *map(str, arguments)],
            env={**self.environment, "RAY_API_SERVER_ADDRESS": self.address, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def workers(self) -> list[str]:
        """Titles of the processes that run code of ours on the cluster."""
        titles = [" ".join(p.cmdline()) for p in _processes(self.mark)]
        ours = re.compile(r"ray::(Learner|RolloutWorker|TeacherScorer)|distill_system train")
        return [title for title in titles if ours.search(title)]

    def living(self, kind: str) -> list[str]:
        """What Ray itself still holds for runs: actors or placement groups, by name."""
        rows = json.loads(self.answer(f"api/v0/{kind}?limit=1000"))["data"]["result"]["result"]
        left = [row for row in rows if row["state"] not in ("DEAD", "REMOVED")]
        return [row["name"] for row in left if "_ray_internal_job" not in row["name"]]

    def answer(self, path: str) -> str:
        """What Ray's API answers, to whoever holds the token."""
        request = Request(
            f"{self.address}/{path}", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urlopen(request, timeout=30) as answer:
            return str(answer.read().decode())

    def end(self) -> None:
        while left := _processes(self.mark):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        self.log.close()


def _processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _free_ports(count: int) -> list[int]:
    """Below those that the system gives out, which another test's cluster may take meanwhile."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 20 * count):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found[:count]


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _wait(condition: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Ray's sockets lie below it, and a socket's path has at most 107 bytes: pytest's is too long.
    with TemporaryDirectory(prefix="ray-") as folder:
        started = Cluster(Path(folder))
        yield started
        started.end()


@pytest.fixture
def configuration(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    path = write_configuration(tmp_path, tiny_model_folder(seed=1), tiny_model_folder(seed=2))
    form = json.loads(path.read_text())
    form["rollout"]["engine"] = "transformers"  # its workers start in half the time
    form["distill"] |= {"steps": 5000, "keep_checkpoints": 1}
    form["trackers"] = []
    path.write_text(json.dumps(form))
    return path


ENDING_SOON = (
    "distill.measure_every=1",
    "distill.early_stopping={metric: held_out/cross_entropy, mode: min, patience: 1, "
    "min_gain: 1000}",
)
"""Overrides with which a resumed run ends after two steps."""

DETAILS = "api/v0/actors?limit=1000&detail=1"
"""Every worker of the cluster, with its runtime environment."""

LOGS = {"driver", "learner-0", "student_rollout-0", "teacher_rollout-0", "teacher_scoring-0"}


def test_a_job_is_sent_watched_stopped_and_gone_on_with(
    cluster: Cluster, configuration: Path
) -> None:
    run = configuration.parent / "run"
    checkpoints = run / "checkpoints/distill"

    sent = cluster.command("submit", configuration)
    [job] = re.findall(r"^submitted: (run-\w+) to http", sent, re.MULTILINE)
    # Nothing of this is on the machine that submits, so that the job itself finds it out. Meanwhile
    # the first one loads its models.
    lost = f"teacher.path={configuration.parent / 'nowhere'}"
    failed = cluster.command("submit", configuration, lost, "--name", "lost", "--wait", code=1)
    assert f"not on this machine: {lost}" in failed
    [error] = re.findall(r"^FAILED: lost-\w+: (.*)$", failed, re.MULTILINE)
    assert error.startswith("ModelError: teacher.path")

    _wait(lambda: list(checkpoints.glob("step_??????")), COMMAND_SECONDS)
    stopped = cluster.command("stop", "run")
    assert f"{job} is STOPPED" in stopped
    _wait(lambda: cluster.workers() == [], 60)
    assert cluster.living("actors") == cluster.living("placement_groups") == []
    [last] = [int(path.name.removeprefix("step_")) for path in checkpoints.iterdir()]
    said = cluster.command("logs", "run")
    assert f"the checkpoint after step {last} is complete" in said
    assert "by SIGTERM; submit it again with --resume auto" in said
    assert {path.stem for path in (run / "logs").iterdir()} == LOGS

    again = ("submit", configuration, *ENDING_SOON, "--resume", "auto", "--follow")
    followed = cluster.command(*again)
    assert f"resuming distill after step {last}" in followed
    assert f"report: {run / 'report.html'}" in followed
    assert (run / "student/config.json").is_file()
    standing = cluster.command("status")
    assert re.search(rf"^run: SUCCEEDED after \d+ s, job run-\w+, {run}$", standing, re.MULTILINE)
    assert re.search(rf"^run: STOPPED after \d+ s, job {job}", standing, re.MULTILINE)
    assert error in standing

    jobs = cluster.answer("api/jobs/")
    _check_pages(json.loads(jobs), run, last)
    shown = jobs + cluster.answer(f"api/jobs/{job}/logs") + cluster.answer(DETAILS)
    assert {job, "RAY_JOB_STOP_WAIT_TIME_S", "student_rollout-0"} <= {*re.findall(r"[\w-]+", shown)}
    said += sent + stopped + failed + followed + standing
    assert [name for name, value in planted().items() if value in shown + said] == []
    written = [configuration.parent, cluster.folder / "ray"]
    assert any(cluster.folder.glob("ray/session_latest/logs/job-driver-*.log"))
    assert [*files_with_secrets(written)] == []


def _check_pages(jobs: list[dict[str, Any]], run: Path, last: int) -> None:
    """Ray's dashboard says of each job which run it is, and how far it came."""
    kept = {job["status"]: job["metadata"] for job in jobs if job["metadata"]["run"] == "run"}
    assert {page["report"] for page in kept.values()} == {str(run / "report.html")}
    assert re.match(rf"distill {last + 2}/5000, done in ", kept["SUCCEEDED"]["step"])
    assert re.match(r"distill \d+/5000, ", kept["STOPPED"]["step"])


ASK = """
import sys, time
from distill_system.cluster.job_client import JobClient
from distill_system.cluster.reach import require_cluster
from distill_system.errors import DistillError
joined, submitted = sys.argv[1].split(","), sys.argv[2].split(",")
for ask, address in [*((require_cluster, a) for a in joined), *((JobClient, a) for a in submitted)]:
    begin = time.monotonic()
    try:
        ask(address)
        print("taken")
    except DistillError as error:
        print(str(error).replace(address, "HERE"))
    assert time.monotonic() - begin < 10
"""


def _answers(cluster: Cluster, environment: dict[str, str]) -> list[str]:
    """What is said of the addresses of a cluster: four to join, three to submit to.

    environment: a variable of no text is taken away.
    """
    merged = cluster.environment | environment
    here = [f"127.0.0.1:{port}" for port in (cluster.port, cluster.dashboard, cluster.client)]
    joined = [*here, f"ray://{here[2]}"]
    submitted = [cluster.address, f"http://{here[0]}", f"ray://{here[2]}"]
    done = subprocess.run(
        [sys.executable, "-c", ASK, ",".join(joined), ",".join(submitted)],
        env={name: value for name, value in merged.items() if value},
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "Ray's own lines are no part of a message"
    return done.stdout.splitlines()


def test_what_answers_at_an_address_is_told_in_one_sentence(
    cluster: Cluster, tmp_path: Path
) -> None:
    taken, dashboard, client, scheme, *jobs = _answers(cluster, {})
    assert taken == jobs[0] == "taken"
    assert dashboard.startswith("RAY_ADDRESS=HERE: what answers there speaks HTTP, and a cluster")
    assert "not a Ray cluster's own port (Ray says: RPC error: Method not found!)" in client
    assert "ray:// is Ray Client, through which a run cannot place its workers" in scheme
    assert "what answers there speaks gRPC; the jobs of a cluster are at its dashboard" in jobs[1]
    assert "ray:// is Ray Client; the jobs of a cluster are at its dashboard" in jobs[2]

    (tmp_path / "other").write_text(secrets.token_hex(32))
    wrong = _answers(cluster, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")})
    assert wrong[0].startswith("RAY_ADDRESS=HERE: the cluster refuses this token; give the")
    assert wrong[4].startswith("HERE refuses this token: give the cluster's token: RAY_AUTH_MODE")
    missing = _answers(cluster, {"RAY_AUTH_MODE": "disabled"})
    assert missing[0].startswith("RAY_ADDRESS=HERE: the cluster refuses this token; give the")
    assert missing[4].startswith("HERE asks for a token: give the cluster's token: RAY_AUTH_MODE")
    nobody = {"RAY_AUTH_TOKEN_PATH": "", "HOME": str(tmp_path)}
    unfound = _answers(cluster, nobody)
    assert {line.partition(":")[0] for line in unfound[:-1]} == {
        "RAY_AUTH_MODE=token, and no token was found"
    }
