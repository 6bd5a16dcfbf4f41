"""What a person asks of submitted jobs: how they stand, what they write, that they end."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from distill_system.cluster.job_client import Job
from distill_system.errors import DeadlineError

POLL_SECONDS = 1.0

STOPPED_CODE = 143
"""The exit code of a process that ended by SIGTERM."""

_ERROR = re.compile(r"^[A-Z][A-Za-z]*(?:Error|Interrupted)?: .+")

_REMEDIES = {
    "No module named distill_system": (
        "the environment or image of the cluster lacks the package: install it there, or submit "
        "without --image and without --package installed, which sends it along"
    ),
    "ModuleNotFoundError: No module named": (
        "the cluster's Python lacks what the package needs: run `ray start` in an environment in "
        "which `distill-system doctor` finds everything, name that interpreter by --python, or "
        "give --pip or --image"
    ),
    "python: not found": "no `python` on the cluster's PATH: name the interpreter by --python",
    "SyntaxError": "the cluster's Python is older than 3.11: name another one by --python",
}
"""What a failed start says, and what to do about it."""


class Jobs(Protocol):
    """The part of cluster.JobClient that is used here."""

    def job(self, submission_id: str) -> Job:
        """A job as it is now."""

    def log(self, submission_id: str) -> str:
        """What its driver has written."""

    def follow(self, submission_id: str, write: Callable[[str], None]) -> None:
        """Pass on what its driver writes until it has ended."""

    def stop(self, submission_id: str) -> None:
        """Ask it to end."""


def wait_until_ended(
    jobs: Jobs,
    submission_id: str,
    *,
    write: Callable[[str], None] | None = None,
    notify: Callable[[str], None],
    seconds: float | None = None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Job:
    """Wait for a job's end; each change of its state is a line.

    write: takes what the driver writes as it comes; None: nothing of it is shown.
    seconds: the longest wait; None for no end.
    Raises: DeadlineError after that.
    """
    if write is not None:
        jobs.follow(submission_id, write)
    deadline, said = None if seconds is None else clock() + seconds, ""
    while True:
        job = jobs.job(submission_id)
        if job.status != said and write is None:
            said = job.status
            notify(f"{submission_id}: {said}")
        if job.has_ended:
            return job
        if deadline is not None and clock() >= deadline:
            raise DeadlineError(
                f"the job {submission_id} is still {job.status} after {seconds:g} s: "
                f"`distill-system logs {submission_id}` shows what it does"
            )
        sleep(POLL_SECONDS)


def exit_code(job: Job) -> int:
    """What a command that waited for this job ends with."""
    if job.status == "SUCCEEDED":
        return 0
    return STOPPED_CODE if job.status == "STOPPED" else job.exit_code or 1


def cause(job: Job) -> str:
    """Why a job failed: its own last error, with a remedy where it could not even begin."""
    lines = [line.strip() for line in job.message.splitlines() if line.strip()]
    remedies = [remedy for sign, remedy in _REMEDIES.items() if sign in job.message]
    errors = [line for line in lines if _ERROR.match(line)]
    said = errors[-1] if errors else (lines[-1] if lines else "no message")
    return "; ".join([said, *remedies[:1]])


def describe(jobs: Sequence[Job], *, now: float) -> Iterator[str]:
    """A line for each job: its run, state, age and id, and why it failed."""
    for job in jobs:
        line = f"{job.run or '(not ours)'}: {job.status}{_age(job, now)}, job {job.submission_id}"
        if job.metadata.get("folder"):
            line += f", {job.metadata['folder']}"
        yield line
        if job.status == "FAILED":
            yield f"    {cause(job)}"


def _age(job: Job, now: float) -> str:
    if job.started is None:
        return ""
    if job.ended is not None:
        return f" after {job.ended - job.started:.0f} s"
    return f" for {now - job.started:.0f} s"
