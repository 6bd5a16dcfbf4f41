"""A run's standing, read from files that the run's own writers wrote."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from distill_system.errors import RunStateError
from distill_system.logs import close_log, log_path, open_log
from distill_system.observe import MetricLog, RunDirectory
from distill_system.observe.run_directory import write_json
from distill_system.observe.run_status import describe_status, find_runs


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "runs/mine")
    sft = {"sft": {"steps": 50}}
    write_json(
        run.config_path,
        {"name": "mine", "distill": {"steps": 100}, "student": sft, "teacher": sft},
    )
    return run


def _log(run: RunDirectory, monkeypatch, rows) -> None:
    """Rows of (seconds, stage, step, metrics)."""
    with MetricLog(run, run_name="mine") as log:
        for seconds, stage, step, metrics in rows:
            monkeypatch.setattr(time, "time", lambda now=seconds: now)
            log.log(stage, step, metrics)
    monkeypatch.undo()


def test_a_running_distillation_is_told_in_a_few_lines(run, monkeypatch) -> None:
    rows = [(1000.0 + 2.0 * step, "distill", step, {"learner/loss": 1.0}) for step in range(41)]
    rows[10][3].update({"held_out/cross_entropy": 3.0, "evaluation/test/rouge_l_greedy": 20.0})
    rows[20][3].update({"held_out/cross_entropy": 2.5, "held_out/forward_kl": float("nan")})
    _log(run, monkeypatch, rows)
    pools = {"student_rollout": {"present": 2, "wanted": 3}, "learner": {"present": 1, "wanted": 1}}
    write_json(run.path / "scaling/status.json", {"pools": pools, "answers": {}})
    assert describe_status(run, is_alive=True, now=1085.0) == [
        "mine: running, distill step 40/100, ETA 2:00, last step 0:05 ago",
        f"    folder: {run.path}",
        "    pools: student_rollout x2 (of 3), learner x1",
        "    last scores: learner/loss 1, held_out/cross_entropy 2.5, "
        "evaluation/test/rouge_l_greedy 20",
    ]


def test_a_resumed_run_is_reckoned_by_its_last_steps_alone(run, monkeypatch) -> None:
    """Hours between two lives say nothing of a step's time once enough steps have followed."""
    rows = [(float(step), "distill", step, {}) for step in range(10)]
    rows += [(9000.0 + step, "distill", step, {}) for step in range(10, 60)]
    _log(run, monkeypatch, rows)
    [first, *_] = describe_status(run, is_alive=True, now=9060.0)
    assert first == "mine: running, distill step 59/100, ETA 0:41, last step 0:01 ago"


def test_fine_tuning_and_the_end_are_told_as_what_they_are(run, monkeypatch) -> None:
    _log(run, monkeypatch, [(1.0, "sft_student", 0, {}), (2.0, "sft_student", 1, {})])
    [first, *_] = describe_status(run, is_alive=False, now=9.0)
    assert first == "mine: not running, sft_student step 2/50"
    run.student_directory.mkdir()
    [first, *_] = describe_status(run, is_alive=False)
    assert first == "mine: done, sft_student step 2/50"


@pytest.mark.parametrize("json_lines", [False, True])
def test_the_last_note_is_the_drivers_in_either_form(run, json_lines) -> None:
    path = log_path(run.logs_directory, "driver")
    handler = open_log(path, level="info", json_lines=json_lines)
    logger = logging.getLogger("distill_system.run")
    logger.info("first  note")
    logger.debug("nobody asked for this")
    try:
        raise ValueError("the end")
    except ValueError:
        logger.exception("teacher_scoring-0  is replaced")
    close_log(handler)
    logger.warning("after its end")
    assert (
        describe_status(run, is_alive=False)[-1] == "    last note: teacher_scoring-0  is replaced"
    )
    lines = path.read_text().splitlines()
    if json_lines:
        first, second = map(json.loads, lines)
        assert (first["level"], first["message"]) == ("info", "first  note")
        assert second["traceback"].endswith("ValueError: the end\n")
    else:
        assert lines[0].endswith(" INFO  first  note")
        assert lines[-1] == "    ValueError: the end"


def test_a_folder_without_a_run_and_one_without_a_step(run, tmp_path) -> None:
    [first, _] = describe_status(run, is_alive=True)
    assert first == "mine: running, no step yet"
    with pytest.raises(RunStateError, match=r"config\.json is missing"):
        describe_status(RunDirectory(tmp_path / "none"), is_alive=False)


def test_runs_are_found_newest_first(run, tmp_path, monkeypatch) -> None:
    other = RunDirectory(tmp_path / "runs/other")
    write_json(other.config_path, {"name": "other"})
    (tmp_path / "runs/no_run").mkdir()
    _log(run, monkeypatch, [(1.0, "distill", 0, {})])
    assert [each.path.name for each in find_runs(tmp_path / "runs")] == ["mine", "other"]
