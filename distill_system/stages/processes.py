"""Runs jobs in processes of their own: finished ones are skipped, failures are reported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from distill_system.config import RunConfig, dump_config
from distill_system.observe import RunDirectory
from distill_system.observe.run_directory import write_text
from distill_system.stages import with_parent

LAST_LINES = 12
END_SECONDS = 120.0
"""How long an interrupted run may take to write a checkpoint and end its workers before it is
killed."""

TRAIN = (sys.executable, "-m", "distill_system", "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run. same_teacher: runs whose evaluation of the teacher would be the same."""

    key: str
    config: RunConfig
    same_teacher: tuple[Path, ...] = ()

    @property
    def run(self) -> RunDirectory:
        """The run's folder."""
        return RunDirectory(Path(self.config.runs_directory) / self.config.name)

    @property
    def config_path(self) -> Path:
        """Its configuration, beside its folder."""
        return self.run.path.with_suffix(".json")

    @property
    def log_path(self) -> Path:
        """Everything it printed, beside its folder."""
        return self.run.path.with_suffix(".log")

    @property
    def is_done(self) -> bool:
        """Whether the run has written its report and its last evaluation."""
        return self.run.summary_path.exists() and self.run.evaluation_path("after").exists()


def run_jobs(
    jobs: Sequence[Job],
    *,
    at_once: int,
    notify: Callable[[str], None],
    command: Sequence[str] = TRAIN,
) -> dict[str, str]:
    """Run every job that is not done, at most at_once side by side; returns failures by key.

    command: is given a job's configuration file and --resume, and exits with 0 if the run is done.
    An interrupt ends the runs under way, each of which keeps its newest checkpoint.
    """
    due = [job for job in jobs if not job.is_done]
    notify(f"{len(jobs)} runs, {len(jobs) - len(due)} of them done")
    processes = Processes(command)
    with ThreadPoolExecutor(max_workers=at_once) as threads:
        futures = {job.key: threads.submit(processes.run, job) for job in due}
        failures: dict[str, str] = {}
        try:
            for number, (key, future) in enumerate(futures.items(), start=1):
                seconds, failure = future.result()
                result = f"failed: {failure.splitlines()[-1]}" if failure else f"{seconds:.0f} s"
                notify(f"[{number}/{len(due)}] {key}: {result}")
                if failure:
                    failures[key] = failure
        except BaseException:  # Ctrl-C: start no further job, then end those that run
            threads.shutdown(wait=False, cancel_futures=True)
            processes.end()
            raise
    return failures


class Processes:
    """The processes that are running, each of run_jobs' command; threads share it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self, job: Job) -> tuple[float, str]:
        """Run a job from its newest checkpoint to its end; its seconds, and its failure or ""."""
        _copy_teacher_evaluation(job)
        write_text(job.config_path, dump_config(job.config))
        # Whatever ends this process, kill -9 too, ends the run, or its workers would go on alone.
        launcher = [sys.executable, "-I", "-S", with_parent.__file__, str(os.getpid())]
        command = [*launcher, *self._command, str(job.config_path), "--resume", "auto"]
        started = time.perf_counter()
        with job.log_path.open("wb") as log:
            with self._lock:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
                self._running.append(process)
            code = process.wait()
        with self._lock:
            self._running.remove(process)
        seconds = time.perf_counter() - started
        return seconds, "" if code == 0 else _last_lines(job.log_path, code)

    def end(self) -> None:
        """Ask all processes to end, and wait until each has ended its workers."""
        with self._lock:
            running = list(self._running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + END_SECONDS
        for process in running:
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def _copy_teacher_evaluation(job: Job) -> None:
    """Copy the teacher's evaluation from a run of the same teacher, data and seed, if any."""
    ours = job.run.evaluation_path("teacher")
    theirs = [RunDirectory(path).evaluation_path("teacher") for path in job.same_teacher]
    done = next((path for path in theirs if path.exists()), None)
    if done is not None and not ours.exists():
        ours.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(done, ours)


def _last_lines(path: Path, code: int) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join([f"exit code {code}; {path} ends with:", *lines[-LAST_LINES:]])
