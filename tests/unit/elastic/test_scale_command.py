"""The command that asks a run for other sizes; the run answers while the command sleeps."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.hand_clock import HandClock
from typer.testing import CliRunner

from distill_system.cli import app
from distill_system.config import RunConfig, dump_config
from distill_system.elastic.scale_command import scale
from distill_system.elastic.scale_requests import (
    PoolStatus,
    ScaleRequest,
    ScaleRequests,
    ScaleStatus,
)
from distill_system.errors import (
    ConfigError,
    DeadlineError,
    DistillError,
    ResourceError,
    RunStateError,
)
from distill_system.observe import RunDirectory

ROOM = "pools.student_rollout.max_count=4"


@pytest.fixture
def run(configure: Callable[..., RunConfig]) -> RunDirectory:
    """A run's folder, whose student rollouts may be one to four."""
    config = configure(ROOM)
    directory = RunDirectory(Path(config.runs_directory) / config.name)
    directory.path.mkdir(parents=True)
    directory.config_path.write_text(dump_config(config))
    return directory


class Answering:
    """The run's side: reads one request, and gives one answer at each of its turns.

    A turn comes whenever the command sleeps, on a clock that moves with it alone.
    """

    def __init__(self, run: RunDirectory, *pools: PoolStatus, refusal: str = "") -> None:
        self.run = run
        self.requests = ScaleRequests(run)
        self.pools, self.refusal = list(pools), refusal
        self.heard: list[ScaleRequest] = []
        self.clock = HandClock(on_sleep=self._take_turn)
        self.said: list[str] = []

    def scale(self, *sizes: str, wait: float = 10.0) -> dict[str, PoolStatus]:
        """What the command says while this run listens."""
        with self.requests.listening():
            return scale(
                self.run.path.name,
                sizes,
                runs_directory=str(self.run.path.parent),
                wait_seconds=wait,
                notify=self.said.append,
                clock=self.clock,
                sleep=self.clock.sleep,
            )

    def _take_turn(self) -> None:
        if not self.pools:
            return
        self.heard += self.requests.read_new()
        answers = {request.request_id: self.refusal for request in self.heard}
        status = ScaleStatus(pools={"student_rollout": self.pools.pop(0)}, answers=answers)
        self.requests.write_status(status)


def _scale(run: RunDirectory, *sizes: str) -> Any:
    folder = str(run.path.parent)
    return scale(run.path.name, sizes, runs_directory=folder, wait_seconds=60.0, notify=print)


def test_it_returns_once_the_pool_has_the_size(run: RunDirectory) -> None:
    begun = PoolStatus(wanted=3, present=1, starting=2, since=0.0)
    there = PoolStatus(wanted=3, present=3)
    answering = Answering(run, *[begun] * 11, there)
    assert answering.scale("student_rollout=3") == {"student_rollout": there}
    assert [request.wanted for request in answering.heard] == [{"student_rollout": 3}]
    assert answering.clock.now == 1006.0, "it looks every half second"
    [line] = answering.said
    assert line.startswith("student_rollout: 1 of 3 workers (2 starting, asked for "), "after 5 s"


def test_workers_still_on_their_way_at_the_deadline_are_an_error(run: RunDirectory) -> None:
    begun = PoolStatus(wanted=3, present=1, starting=2, since=time.time())
    answering = Answering(run, *[begun] * 99)
    with pytest.raises(DeadlineError, match=r"1 of 3 workers \(2 starting, .*still on their way"):
        answering.scale("student_rollout=3", wait=1.25)
    assert answering.clock.now == 1001.25


def test_no_place_is_said_at_once_and_is_what_it_ends_with(run: RunDirectory) -> None:
    begun = PoolStatus(wanted=3, present=1, starting=2, since=time.time())
    lacking = replace(begun, no_place="no place for {'CPU': 1.0}: free {'CPU': 0.5} of ... on a")
    answering = Answering(run, begun, *[lacking] * 99)
    with pytest.raises(
        ResourceError, match=r"1 of 3 workers .*no place for .* on a\. The run goes"
    ):
        answering.scale("student_rollout=3", wait=4.0)
    assert answering.said == [
        "student_rollout: no place for {'CPU': 1.0}: free {'CPU': 0.5} of ... on a"
    ], "once, and before the first five seconds are over"


def test_a_refusal_and_a_start_that_failed_are_errors(run: RunDirectory) -> None:
    same = PoolStatus(wanted=1, present=1)
    with pytest.raises(ResourceError, match="the run refused: out of bounds"):
        Answering(run, same, refusal="out of bounds").scale("student_rollout=3")
    failed = PoolStatus(wanted=1, present=1, problem="student_rollout-1 is given up: no room")
    with pytest.raises(ResourceError, match="student_rollout-1 is given up: no room"):
        Answering(run, failed).scale("student_rollout=2")


def test_a_run_that_does_not_answer_is_told(run: RunDirectory) -> None:
    answering = Answering(run)
    with pytest.raises(DeadlineError, match=r"did not read the request within 7 s"):
        answering.scale("student_rollout=3", wait=7.0)
    assert answering.clock.now == 1007.0
    assert answering.said == [
        "waiting for the run to read the request, as it does between two steps"
    ]


def test_nothing_is_asked_where_no_run_listens(run: RunDirectory) -> None:
    with pytest.raises(RunStateError, match="expected a run that is distilling, found none"):
        _scale(run, "student_rollout=3")
    with ScaleRequests(run).listening():
        pass
    with pytest.raises(RunStateError, match="expected a run that is distilling, found none"):
        _scale(run, "student_rollout=3")
    assert ScaleRequests(run).read_new() == []


def _listen_for_ever(path: str, ready: Any) -> None:
    with ScaleRequests(RunDirectory(path)).listening():
        ready.set()
        time.sleep(60.0)


def test_a_run_that_was_killed_is_not_taken_for_alive(run: RunDirectory) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_listen_for_ever, args=(str(run.path), ready))
    process.start()
    assert ready.wait(60.0)
    requests = ScaleRequests(run)
    assert requests.has_listener()
    refused = pytest.raises(RunStateError, match="another process trains this run")
    with refused, requests.listening():
        pass
    requests.write({"student_rollout": 2})
    process.kill()
    process.join()
    assert not requests.has_listener()
    with requests.listening():
        assert requests.read_new() == [], "an earlier run was asked, not this one"


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (["student_rollout"], ConfigError, "expected pool=count"),
        (["student_rollout=-1"], ConfigError, "expected pool=count"),
        (["learner=2"], ConfigError, "pool one of student_rollout, teacher_rollout"),
        (["student_rollout=2", "student_rollout=3"], ConfigError, "given twice"),
        (["student_rollout=5"], ConfigError, r"expected 1 to 4.*pools\.student_rollout\.min_count"),
        (["teacher_scoring=2"], ConfigError, "expected 1 to 1"),
    ],
)
def test_what_cannot_be_asked_is_told_before_the_run_is(
    run: RunDirectory, sizes: list[str], error: type[DistillError], message: str
) -> None:
    with ScaleRequests(run).listening():
        with pytest.raises(error, match=message):
            _scale(run, *sizes)
        assert ScaleRequests(run).read_new() == []


def test_the_command_prints_the_answer_and_finds_a_run_by_its_folder_too(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering = Answering(run, PoolStatus(wanted=2, present=2))
    monkeypatch.setitem(scale.__kwdefaults__, "clock", answering.clock)
    monkeypatch.setitem(scale.__kwdefaults__, "sleep", answering.clock.sleep)
    with answering.requests.listening():
        said = CliRunner().invoke(app, ["scale", str(run.path), "student_rollout=2"])
    assert (said.exit_code, said.output) == (0, "student_rollout: 2 of 2 workers\n")
    said = CliRunner().invoke(app, ["scale", "nowhere", "student_rollout=2"])
    assert said.exit_code == 1
    assert "no run 'nowhere'" in said.output
