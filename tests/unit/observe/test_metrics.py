import json
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill_system.errors import RunStateError
from distill_system.observe import trackers
from distill_system.observe.metrics import MetricLog, read_metrics
from distill_system.observe.run_directory import RunDirectory


def read_scalars(run: RunDirectory, stage: str, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run.tensorboard_directory / stage)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_rows_come_back_as_they_were_logged(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with MetricLog(run, run_name="r") as log:
        log.log("sft_teacher", 1, {"learner/loss": 2.5})
        log.log("distill", 1, {"learner/loss": -0.5, "learner/tokens": 7})
    rows = read_metrics(run)
    assert [(row.stage, row.step, row.metrics) for row in rows] == [
        ("sft_teacher", 1, {"learner/loss": 2.5}),
        ("distill", 1, {"learner/loss": -0.5, "learner/tokens": 7.0}),
    ]
    assert read_scalars(run, "distill", "distill/learner/loss") == [(1, -0.5)]


def test_values_that_are_not_finite_keep_the_file_valid_json(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with MetricLog(run, run_name="r") as log:
        log.log("distill", 1, {"a": math.nan, "b": -math.inf, "c": 1.0})

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    json.loads(run.metrics_path.read_text(), parse_constant=refuse)
    assert read_metrics(run)[0].metrics == {"a": None, "b": None, "c": 1.0}


def test_a_half_written_last_line_is_dropped_on_opening(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with MetricLog(run, run_name="r") as log:
        log.log("distill", 1, {"a": 1.0})
        log.log("distill", 2, {"a": 2.0})
    whole = run.metrics_path.read_bytes()
    run.metrics_path.write_bytes(whole[:-9])
    assert [row.step for row in read_metrics(run)] == [1]
    with MetricLog(run, run_name="r") as log:
        log.log("distill", 2, {"a": 2.5})
    assert [(row.step, row.metrics["a"]) for row in read_metrics(run)] == [(1, 1.0), (2, 2.5)]


def test_a_resume_leaves_every_step_once(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with MetricLog(run, run_name="r") as log:
        log.log("sft_student", 9, {"a": 9.0})
        for step in range(1, 6):
            log.log("distill", step, {"a": float(step)})
    with MetricLog(run, run_name="r") as log:
        log.truncate_after("distill", 3)
        for step in range(4, 7):
            log.log("distill", step, {"a": 10.0 * step})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    rows = [row for row in read_metrics(run) if row.stage == "distill"]
    assert [(row.step, row.metrics["a"]) for row in rows] == expected
    assert read_scalars(run, "distill", "distill/a") == expected
    assert [row.step for row in read_metrics(run) if row.stage == "sft_student"] == [9]
    assert read_scalars(run, "sft_student", "sft_student/a") == [(9, 9.0)]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics_path.write_text('{"time":0,"stage":"distill","step":1,"metrics":{}}\nnonsense\n')
    with pytest.raises(RunStateError, match="line 2"):
        read_metrics(run)


def test_two_threads_never_mix_their_lines(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with MetricLog(run, run_name="r") as log:

        def work(stage: str) -> None:
            for step in range(100):
                log.log(stage, step, {"learner/loss": 1.0})

        threads = [threading.Thread(target=work, args=(f"sft_{role}",)) for role in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    rows = read_metrics(run)
    for stage in ("sft_a", "sft_b"):
        assert [row.step for row in rows if row.stage == stage] == list(range(100))


def test_a_run_without_metrics_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(RunDirectory(tmp_path)) == []


class Broken:
    """A tracker whose server is gone from the second row on."""

    def __init__(self) -> None:
        self.num_rows = 0

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.num_rows += 1
        if self.num_rows > 1:
            raise ConnectionError("no route to host")

    def truncate_after(self, stage: str, step: int) -> None:
        pass

    def close(self) -> None:
        raise AssertionError("what is dropped is not asked again")


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    broken = Broken()
    with MetricLog(RunDirectory(tmp_path), run_name="r", notify=said.append) as log:
        log.add_tracker("somewhere", broken)
        for step in range(4):
            log.log("distill", step, {"a": 1.0})
    assert broken.num_rows == 2
    [line] = said
    assert line.startswith("somewhere failed")
    assert "no route to host" in line
    assert len(read_metrics(RunDirectory(tmp_path))) == 4
    assert len(read_scalars(RunDirectory(tmp_path), "distill", "distill/a")) == 4


class Hanging(Broken):
    """A server that takes nothing and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.num_rows += 1
        self.goes_on.wait()


def test_a_tracker_that_hangs_holds_up_nobody_and_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "HANG_SECONDS", 1.0)
    said: list[str] = []
    hanging, began = Hanging(), time.monotonic()
    with MetricLog(RunDirectory(tmp_path), run_name="r", notify=said.append) as log:
        log.add_tracker("somewhere", hanging)
        for step in range(40):
            log.log("distill", step, {"a": 1.0})
            assert len(read_metrics(RunDirectory(tmp_path))) == step + 1
            time.sleep(0.05)
    assert time.monotonic() - began < 20.0
    hanging.goes_on.set()
    assert hanging.num_rows == 1
    [line] = said
    assert line.startswith("somewhere failed and gets nothing more of this run: no answer for 1 s")
    assert len(read_scalars(RunDirectory(tmp_path), "distill", "distill/a")) == 40
