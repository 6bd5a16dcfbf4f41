"""The Python interface: light to import, the command line's checks, and what a run left."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import distill_system
from distill_system import DistillResult, configure, distill
from distill_system.errors import ConfigError
from distill_system.observe import RunDirectory

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/quickstart.yaml"


def test_importing_the_package_imports_nothing_else() -> None:
    program = """
import sys, distill_system
heavy = {"torch", "ray", "vllm", "transformers", "pydantic", "yaml"} & set(sys.modules)
assert not heavy, heavy
assert {"distill", "configure"} <= set(dir(distill_system))
from distill_system import configure
heavy = {"torch", "ray", "vllm", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        _ = distill_system.distil


def test_files_mappings_and_overrides_are_layers() -> None:
    settings = {"name": "mine", "distill": {"steps": 5}, "runs_directory": Path("there")}
    config = configure([QUICKSTART, settings], "distill.steps=7", seed=3)
    assert (config.name, config.distill.steps, config.seed) == ("mine", 7, 3)
    assert config.runs_directory == "there"
    assert configure(config) == config
    assert configure(str(QUICKSTART), objective="gkd").distill.off_policy_source == "dataset"
    changed = configure(config, data={"max_prompt_tokens": 9})
    assert changed.data.max_prompt_tokens == 9
    assert changed.data.held_out == config.data.held_out, "a section is merged, not replaced"


def test_a_mistake_in_a_mapping_names_its_place_and_key() -> None:
    with pytest.raises(ConfigError) as raised:
        configure([QUICKSTART, {"distill": {"steps": 0, "learning_rate": 1e-5}}])
    assert "distill.steps (the settings given, distill.steps): expected a whole" in str(
        raised.value
    )
    assert "did you mean distill.optimizer.learning_rate?" in str(raised.value)
    with pytest.raises(ConfigError, match=r"the settings given, seed: expected .* got complex"):
        configure([QUICKSTART, {"seed": 3j}])


def test_a_run_comes_back_as_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "runs/mine")
    run.path.mkdir(parents=True)
    rows = [
        {"time": 0.0, "stage": "sft_student", "step": 0, "metrics": {"learner/loss": 2.0}},
        {"time": 0.0, "stage": "distill", "step": 0, "metrics": {"held_out/x": None}},
        {"time": 0.0, "stage": "distill", "step": 1, "metrics": {"learner/loss": 1.0}},
    ]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = {"before": 1.0, "after": 2.0, "teacher": 3.0}
    run.summary_path.write_text(json.dumps({"scores": {"test": {"rouge_l_greedy": score}}}))
    asked: list[Any] = []

    def train_all(config: Any, *, resume: bool) -> RunDirectory:
        asked.append((config.name, resume))
        return run

    module: Any = SimpleNamespace(train_all=train_all)
    monkeypatch.setitem(sys.modules, "distill_system.stages.curriculum", module)
    result = distill(QUICKSTART, name="mine", resume=True)
    assert asked == [("mine", True)]
    assert result.student == run.path / "student"
    assert result.scores("test") == {"rouge_l_greedy": 2.0}
    assert result.metrics["distill"] == [
        {"step": 0, "held_out/x": None},
        {"step": 1, "learner/loss": 1.0},
    ]


def test_the_example_script_runs_on_two_models_and_a_file_of_rows(
    tiny_model_folder: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All of it but the training: the configuration is checked, the student is a real model."""
    rows = [{"prompt": f"w{4 + at} w9", "response": "w7"} for at in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = tiny_model_folder(seed=2, num_layers=1)
    asked: list[Any] = []

    def instead(settings: Any, *overrides: str, resume: bool) -> DistillResult:
        asked.append(configure(settings, *overrides))
        return DistillResult(
            run=tmp_path,
            student=student,
            summary={"scores": {"test": {"rouge_l_greedy": {"after": 12.34}}}},
            metrics={"distill": [{"step": 5, "held_out/cross_entropy": 3.5}, {"step": 6}]},
        )

    monkeypatch.setattr("distill_system.api.distill", instead)
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(ROOT / "configs/distill_from_python.py"))
    script["main"](str(tiny_model_folder(seed=1)), str(student), "rows.jsonl")
    assert asked[0].distill.steps == 20
    assert asked[0].distill.optimizer.learning_rate == 1e-4
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["rouge_l_greedy: 12.3", "step 5: held-out cross-entropy 3.500"]
    assert said[2].startswith("Say something. -> ")
