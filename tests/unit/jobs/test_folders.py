"""Standing, logs and end of a run, whose lock a process of this machine holds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distill_system.cli import app
from distill_system.errors import DeadlineError, RunStateError
from distill_system.jobs import folders
from distill_system.observe import RunDirectory
from distill_system.observe.run_directory import write_json
from distill_system.observe.run_lock import Holder

HOLD = """
import signal, sys, time
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.run_lock import locked
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0) if sys.argv[2] == "ends" else None)
with locked(RunDirectory(sys.argv[1])):
    print("held", flush=True)
    while True:
        time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "mine")
    write_json(run.config_path, {"name": "mine", "distill": {"steps": 10}})
    return run


@pytest.fixture
def hold(run: RunDirectory) -> Iterator:
    """Starts a process that holds the run's lock, as one that trains it does."""
    started: list[subprocess.Popen] = []

    def begin(how: str) -> subprocess.Popen:
        line = [sys.executable, "-c", HOLD, str(run.path), how]
        started.append(subprocess.Popen(line, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_is_alive_while_its_process_is_and_ends_by_sigterm(run, hold, tmp_path) -> None:
    assert folders.stop("mine", str(tmp_path), seconds=1.0).endswith("nobody trains it")
    process = hold("ends")
    assert next(folders.describe("mine", str(tmp_path))) == "mine: running, no step yet"
    assert folders.stop(str(run.path), "", seconds=60.0) == (
        f"{run.path}: ended, `--resume` goes on"
    )
    assert process.wait(timeout=10) == 0
    assert next(folders.describe(None, str(tmp_path))) == "mine: not running, no step yet"


def test_a_process_that_does_not_end_is_told_and_a_killed_one_holds_nothing(run, hold) -> None:
    process = hold("stays")
    with pytest.raises(DeadlineError, match=rf"process {process.pid} still trains .* 0\.3 s after"):
        folders.stop(str(run.path), "", seconds=0.3)
    process.kill()
    process.wait()
    assert next(folders.describe(str(run.path), "")) == "mine: not running, no step yet"


def test_a_run_of_another_machine_is_not_ended_from_here(run, hold, monkeypatch) -> None:
    hold("ends")
    monkeypatch.setattr(Holder, "is_here", False)
    with pytest.raises(RunStateError, match=rf"process \d+ on {os.uname().nodename}.*end it there"):
        folders.stop(str(run.path), "", seconds=1.0)


def test_logs_are_named_where_there_is_no_such_one(run, tmp_path) -> None:
    run.logs_directory.mkdir()
    (run.logs_directory / "driver.log").write_text("a line\n")
    assert folders.read_log("mine", "driver", str(tmp_path)) == "a line\n"
    with pytest.raises(RunStateError, match=r"learner-9\.log: there is no such log; .*: driver"):
        folders.read_log("mine", "learner-9", str(tmp_path))


def test_the_command_line_asks_the_folder_unless_it_has_an_address(
    run, tmp_path, monkeypatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    said = CliRunner().invoke(app, ["status", "--runs-directory", str(tmp_path)])
    assert said.output.startswith("mine: not running, no step yet\n    folder: ")
    none = CliRunner().invoke(app, ["status", "--runs-directory", str(tmp_path / "none")])
    assert (none.exit_code, "no run below" in none.stderr) == (1, True)
    refused = CliRunner().invoke(app, ["status", "--address", "127.0.0.1:9"])
    assert (refused.exit_code, "no Ray cluster answers" in refused.stderr) == (1, True)
