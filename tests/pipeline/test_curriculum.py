"""A curriculum by the real command line: killed inside its second stage, it goes on there.

That stage has all that stages may have: an earlier student as teacher, a weight in closed form from
two students, sources whose weights follow measurements.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.command_line import Run, wait_until, write_configuration
from run_comparison import judge

from distill_system.observe import RunDirectory
from distill_system.observe.metrics import read_metrics


def _rows(skip: int, count: int) -> dict[str, Any]:
    return {"type": "jsonl", "path": "prompts.jsonl", "skip": skip, "num_examples": count}


SECOND = {
    "name": "second",
    "teacher": "previous",
    "student": "initial",
    "label_weight": {"labels": "initial", "teacher": "first"},
    "data": {
        "prompts": {
            "type": "mixture",
            "policy": {"every": 2},
            "sources": {
                "a": {"source": _rows(0, 30), "held_out": _rows(56, 2)},
                "b": {"source": _rows(30, 26), "held_out": _rows(58, 2)},
            },
        }
    },
    "distill": {
        "steps": 8,
        "objective": {
            "type": "token_matching",
            "off_policy": {"type": "interpolated_cross_entropy", "schedule": "constant"},
            "on_policy": {"type": "forward_kl"},
        },
    },
}


def test_a_curriculum_that_is_killed_in_its_second_stage_goes_on_there(
    launch: Callable[..., Run], tmp_path: Path, tiny_model_folder: Callable[..., Path]
) -> None:
    teacher, student = tiny_model_folder(seed=1), tiny_model_folder(seed=2, num_layers=1)
    path = write_configuration(tmp_path, teacher, student)
    form = json.loads(path.read_text())
    form["rollout"]["engine"] = "transformers"  # it starts sooner
    form["curriculum"] = [{"name": "first", "distill": {"steps": 2}}, SECOND]
    path.write_text(json.dumps(form))
    first, second = (RunDirectory(tmp_path / "run" / name) for name in ("1_first", "2_second"))

    run = launch("train", path)
    wait_until((second.checkpoints_directory / "distill/step_000003").exists, run, 400)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    run.end()
    finished = (first.student_directory / "model.safetensors").stat().st_mtime_ns
    assert not second.student_directory.exists()

    run = launch("train", path, "--resume").finish(300)
    assert run.code == 0, run.stderr
    assert "resuming distill after step" in run.stdout + run.stderr
    assert (first.student_directory / "model.safetensors").stat().st_mtime_ns == finished
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [(stage["stage"], stage["step"]) for stage in summary["stages"]] == [
        ("first", 2),
        ("second", 8),
    ]

    resumed = RunDirectory(tmp_path / "resumed")
    second.path.rename(resumed.path)
    second.path.mkdir()
    shutil.copy(resumed.path / "label_weight.json", second.path)
    run = launch("train", path).finish(300)  # the second stage anew, and nobody touches it
    assert run.code == 0, run.stderr
    verdict = judge(resumed, second)
    assert verdict.is_the_same, verdict

    config = json.loads(second.config_path.read_text())
    assert config["teacher"]["path"] == str(first.student_directory)
    assert config["student"]["path"] == str(student)
    weight = json.loads((second.path / "label_weight.json").read_text())["label_weight"]
    assert config["distill"]["objective"]["off_policy"]["teacher_weight"] == 1.0 - weight
    weights = {
        row.step: [row.metrics[f"source_weight/{name}"] for name in ("a", "b")]
        for row in read_metrics(second)
        if "source_weight/a" in row.metrics
    }
    assert [*weights] == [0, 2, 4, 6, 8]
    for both in weights.values():
        assert abs(sum(value for value in both if value is not None) - 1.0) < 1e-9
