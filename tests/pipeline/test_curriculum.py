"""A curriculum by the real command line: killed inside its second stage, it goes on there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from pipeline.command_line import Run, wait_until, write_configuration
from run_comparison import judge

from distill_system.observe import RunDirectory

STAGES = [
    {"name": "first", "distill": {"steps": 2}},
    {
        "name": "second",
        "teacher": "previous",
        "student": "initial",
        "distill": {"steps": 8, "objective": {"type": "token_matching", "on_policy": {}}},
    },
]


def test_a_curriculum_that_is_killed_in_its_second_stage_goes_on_there(
    launch: Callable[..., Run], tmp_path: Path, tiny_model_folder: Callable[..., Path]
) -> None:
    teacher, student = tiny_model_folder(seed=1), tiny_model_folder(seed=2, num_layers=1)
    path = write_configuration(tmp_path, teacher, student)
    form = json.loads(path.read_text())
    form["rollout"]["engine"] = "transformers"  # it starts sooner
    path.write_text(json.dumps({**form, "curriculum": STAGES}))
    second = RunDirectory(tmp_path / "run/2_second")

    run = launch("train", path)
    wait_until((second.checkpoints_directory / "distill/step_000003").exists, run, 300)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    run.end()
    finished = (tmp_path / "run/1_first/student/model.safetensors").stat().st_mtime_ns
    assert not second.student_directory.exists()

    run = launch("train", path, "--resume").finish(300)
    assert run.code == 0, run.stderr
    assert "resuming distill after step" in run.stdout + run.stderr
    assert (tmp_path / "run/1_first/student/model.safetensors").stat().st_mtime_ns == finished
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [stage["step"] for stage in summary["stages"]] == [2, 8]

    resumed = RunDirectory(tmp_path / "resumed")
    second.path.rename(resumed.path)
    run = launch("train", path).finish(300)  # the second stage anew, and nobody touches it
    assert run.code == 0, run.stderr
    verdict = judge(resumed, second)
    assert verdict.is_the_same, verdict
    config = json.loads(second.config_path.read_text())
    assert config["teacher"]["path"] == str(tmp_path / "run/1_first/student")
    assert config["student"]["path"] == str(student)
