"""The quickstart in little, by the transformers engine, where vLLM cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BLOCKED = 'import sys\nsys.modules["vllm"] = None\n'
SPLITS = ("in_distribution", "paraphrase", "longer_input", "composition", "distractor")
LITTLE: dict[str, Any] = {
    "data": {
        "teacher_sft": {"num_examples": 600},
        "student_sft": {"num_examples": 300},
        "prompts": {"num_examples": 60},
        "held_out": {"num_examples": 16},
        "evaluation": {split: {"num_examples": 4} for split in SPLITS},
    },
    "teacher": {"sft": {"steps": 20}},
    "student": {"sft": {"steps": 20}},
    "rollout": {"engine": "transformers"},
    "distill": {
        "steps": 4,
        "student_prompts_per_step": 8,
        "teacher_prompts_per_step": 8,
        "measure_every": 2,
        "evaluate_every": None,
    },
}


def _metrics(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["metrics"] for row in rows if row["stage"] == "distill"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without_vllm")
    (folder / "little.yaml").write_text(yaml.safe_dump(LITTLE))
    (folder / "sitecustomize.py").write_text(BLOCKED)  # of the command and of all its workers
    done = subprocess.run(
        [
            *(sys.executable, "-m", "distill_system", "train"),
            *(str(ROOT / "configs/quickstart.yaml"), str(folder / "little.yaml")),
            f"runs_directory={folder}",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "quickstart"


def test_the_run_goes_to_its_end(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["scores"]) == set(SPLITS)
    assert (run / "report.html").exists()
    assert (run / "student" / "model.safetensors").exists()


def test_what_the_engine_says_of_its_tokens_is_what_the_learner_says(run: Path) -> None:
    """After each update: the weights that the learner made are those that wrote the next text."""
    metrics = _metrics(run)
    gaps = [row["learner/logprob_gap"] for row in metrics if "learner/logprob_gap" in row]
    held_out = [row["held_out/max_logprob_gap"] for row in metrics if "held_out/logprob_gap" in row]
    assert len(gaps) == 4
    assert max(gaps) < 1e-4
    assert len(held_out) == 3
    assert max(held_out) < 1e-4
    assert all(row["learner/gradient_norm"] > 0 for row in metrics if "learner/loss" in row)
