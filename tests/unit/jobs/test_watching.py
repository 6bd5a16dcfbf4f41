"""How a job stands and ends, told from what Ray says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill_system.cluster.job_client import Job, _Tail
from distill_system.errors import DeadlineError
from distill_system.jobs.watching import cause, describe, exit_code, wait_until_ended

JOB = Job(
    submission_id="mine-1",
    status="RUNNING",
    message="Job is currently running.",
    metadata={"run": "mine", "folder": "/shared/runs/mine"},
    exit_code=None,
    started=100.0,
    ended=None,
)

FAILED = replace(
    JOB,
    status="FAILED",
    exit_code=1,
    ended=130.0,
    message=(
        "Job entrypoint command failed with exit code 1, last available logs (truncated to 20,000 "
        "chars):\ndata.prompts: 5 of 5 rows\nModelError: teacher.path='/x': expected a folder\n"
    ),
)


class Jobs:
    """A job that goes through these states, one a look."""

    def __init__(self, *states: Job) -> None:
        self.states = list(states)
        self.followed = ""

    def job(self, submission_id: str) -> Job:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def log(self, submission_id: str) -> str:
        return "a\nb\n"

    def follow(self, submission_id: str, write) -> None:
        write("a\n")

    def stop(self, submission_id: str) -> None:
        raise AssertionError("nobody asked for it")


def test_each_state_is_told_once_until_the_end() -> None:
    said: list[str] = []
    jobs = Jobs(replace(JOB, status="PENDING"), JOB, JOB, FAILED)
    ended = wait_until_ended(jobs, "mine-1", notify=said.append, sleep=lambda _: None)
    assert ended is FAILED
    assert said == ["mine-1: PENDING", "mine-1: RUNNING", "mine-1: FAILED"]


def test_what_the_driver_writes_takes_the_place_of_states() -> None:
    said: list[str] = []
    written: list[str] = []
    wait_until_ended(
        Jobs(FAILED), "mine-1", write=written.append, notify=said.append, sleep=lambda _: None
    )
    assert (said, written) == ([], ["a\n"])


def test_a_wait_has_an_end() -> None:
    now = iter(range(100))
    with pytest.raises(DeadlineError, match=r"mine-1 is still RUNNING after 5 s"):
        wait_until_ended(
            Jobs(JOB),
            "mine-1",
            notify=print,
            seconds=5.0,
            sleep=lambda _: None,
            clock=lambda: float(next(now)),
        )


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (replace(JOB, status="SUCCEEDED", exit_code=0), 0),
        (replace(FAILED, exit_code=3), 3),
        (replace(FAILED, exit_code=None), 1),
        (replace(JOB, status="STOPPED"), 143),
    ],
)
def test_the_exit_code_is_the_jobs(job: Job, code: int) -> None:
    assert exit_code(job) == code


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (FAILED.message, "ModelError: teacher.path='/x': expected a folder"),
        (
            "...\n/usr/bin/python: No module named distill_system",
            "without --package installed, which sends it along",
        ),
        (
            "Traceback\nModuleNotFoundError: No module named 'pydantic'",
            "`distill-system doctor` finds everything",
        ),
        ("/bin/sh: 1: exec: python: not found", "name the interpreter by --python"),
        ("runtime_env setup failed: no", "runtime_env setup failed: no"),
        ("", "no message"),
    ],
)
def test_a_failure_has_its_cause_and_a_remedy(message: str, said: str) -> None:
    assert said in cause(replace(FAILED, message=message))


def test_jobs_are_listed_with_age_folder_and_cause() -> None:
    stranger = replace(JOB, metadata={}, status="SUCCEEDED", ended=101.5)
    assert list(describe([JOB, FAILED, stranger], now=160.0)) == [
        "mine: RUNNING for 60 s, job mine-1, /shared/runs/mine",
        "mine: FAILED after 30 s, job mine-1, /shared/runs/mine",
        "    ModelError: teacher.path='/x': expected a folder",
        "(not ours): SUCCEEDED after 2 s, job mine-1",
    ]


def test_a_text_read_again_from_its_beginning_is_passed_on_once() -> None:
    written: list[str] = []
    tail = _Tail(written.append)
    for parts in (["ab", "c"], ["a", "bcd"], [], ["abcdef"]):
        tail.begin()
        for part in parts:
            tail.add(part)
    assert "".join(written) == "abcdef"
