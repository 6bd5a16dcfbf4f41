"""What a person asks of a run that needs no cluster: its folder says it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from distill_system.errors import DeadlineError, RunStateError
from distill_system.logs import log_path
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.run_lock import find_holder
from distill_system.observe.run_status import (
    describe_status,
    find_run,
    find_runs,
    find_stages,
)

POLL_SECONDS = 0.2


def describe(name: str | None, runs_directory: str) -> Iterator[str]:
    """The lines about one run, or about every run below a folder.

    name: a run's folder, or its name below runs_directory; None for every run there.
    Raises: RunStateError if there is none.
    """
    runs = find_runs(Path(runs_directory)) if name is None else [find_run(name, runs_directory)]
    if not runs:
        raise RunStateError(
            f"no run below {Path(runs_directory).absolute()} (--runs-directory). The jobs of a "
            "cluster are listed with --address"
        )
    for run in runs:
        for part in find_stages(run) or [run]:
            yield from describe_status(part, is_alive=find_holder(part) is not None)


def describe_if_here(folder: str | None) -> list[str]:
    """The same of a job's run, where this machine reaches its folder."""
    run = RunDirectory(folder or "")
    return list(describe(folder, "")) if folder and run.config_path.exists() else []


def read_log(name: str, worker: str, runs_directory: str) -> str:
    """The log of the driver or of a worker.

    Raises: RunStateError, naming the logs that there are.
    """
    folder = find_run(name, runs_directory).logs_directory
    path = log_path(folder, worker)
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.log"))) or "none"
        raise RunStateError(f"{path}: there is no such log; logs there: {there}")
    return path.read_text(encoding="utf-8", errors="replace")


def stop(
    name: str,
    runs_directory: str,
    *,
    seconds: float,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """End the process of this machine that trains a run, and wait for it; says what happened.

    Raises: RunStateError for a run that another machine trains; DeadlineError after `seconds`.
    """
    run = find_run(name, runs_directory)
    holder = find_holder(run)
    if holder is None:
        return f"{run.path}: nobody trains it"
    if not holder.is_here:
        raise RunStateError(
            f"{run.path} is trained by {holder.describe()}: end it there, or with --address as a "
            "job of its cluster"
        )
    os.kill(holder.process, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while find_holder(run) == holder:
        if time.monotonic() >= deadline:
            raise DeadlineError(
                f"process {holder.process} still trains {run.path} {seconds:g} s after SIGTERM "
                "(--wait); a second SIGTERM ends it at once, without a checkpoint"
            )
        sleep(POLL_SECONDS)
    return f"{run.path}: ended, `--resume` goes on"
