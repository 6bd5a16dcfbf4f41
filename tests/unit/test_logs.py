"""Logs that errors name."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill_system.errors import DeadlineError, WorkerError
from distill_system.logs import name_logs


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (WorkerError("learner-0 (process 5 on a) died. Look."), ["learner-0"]),
        (
            DeadlineError("no answer of student_rollout-1, learner-0"),
            ["student_rollout-1", "learner-0"],
        ),
        (WorkerError("teacher_scoring-7 has no log"), []),
        (WorkerError("a utf-8 file of step-3"), []),
    ],
)
def test_an_error_names_the_logs_of_its_workers(
    error: Exception, named: list[str], tmp_path: Path
) -> None:
    for name in ("learner-0", "student_rollout-1", "driver"):
        (tmp_path / f"{name}.log").touch()
    before = str(error).rstrip(".")
    name_logs(error, tmp_path)
    paths = ", ".join(str(tmp_path / f"{name}.log") for name in named)
    assert str(error).rstrip(".") == before + (f". Log: {paths.rstrip('.')}" if named else "")
