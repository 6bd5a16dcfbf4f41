"""Runs of seconds a step on the embedded task, for scripts that try what a run survives."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
TESTS = Path(__file__).parents[1] / "tests"
# Not `pipeline.command_line`: benchmarks/ has a pipeline of its own.
sys.path += [str(TESTS), str(TESTS / "pipeline")]
from command_line import start  # noqa: E402  # found by that path

START_SECONDS = 900


def write_configuration(folder: Path, *, name: str, seed: int, **sections: Any) -> Path:
    """A configuration in `folder`; its two models are made there first, once.

    sections: what differs, section by section.
    """
    models = folder / "models"
    if not (models / "student_sft").exists():
        _make_models(folder, seed)
    form = _merge(
        {
            "name": name,
            "seed": seed,
            "runs_directory": str(folder),
            "data": _data(),
            "teacher": {"path": str(models / "teacher")},
            "student": {"path": str(models / "student_sft")},
            "rollout": {
                "sampling": {"max_response_tokens": 16},
                "student_engine": {"kv_cache_mebibytes": 16},
                "teacher_engine": {"kv_cache_mebibytes": 16},
            },
            "distill": {
                "steps": 60,
                "student_prompts_per_step": 8,
                "teacher_prompts_per_step": 8,
                "objective": {"type": "ammd", "critic": {"type": "gradient_ascent"}},
                "optimizer": {"type": "muon", "learning_rate": 1e-3, "warmup_steps": 5},
                "measure_every": 5,
                "checkpoint_every": 5,
            },
            "pools": {
                pool: {"cpus": 0.2}
                for pool in ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
            },
            "cluster": {"dashboard": False},
        },
        sections,
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(form, sort_keys=False))
    return path


def _make_models(folder: Path, seed: int) -> None:
    """A teacher and a student that know a little of the embedded task."""
    shape = {"num_heads": 2, "max_position_embeddings": 128}
    sft = {"batch_size": 32, "optimizer": {"type": "muon", "learning_rate": 2e-3}}
    rows = {"type": "embedded", "split": "train"}
    form = {
        "name": "models",
        "seed": seed,
        "runs_directory": str(folder),
        "tokenizer": {"type": "embedded"},
        "data": _data()
        | {
            "teacher_sft": rows | {"num_examples": 4000, "seed": 1},
            "student_sft": rows | {"num_examples": 1000, "seed": 2},
        },
        "teacher": {
            "architecture": shape | {"hidden_size": 64, "intermediate_size": 172, "num_layers": 2},
            "sft": sft | {"steps": 60},
        },
        "student": {
            "architecture": shape | {"hidden_size": 64, "intermediate_size": 172, "num_layers": 1},
            "sft": sft | {"steps": 30},
        },
        "rollout": {"sampling": {"max_response_tokens": 16}},
        "distill": {
            "steps": 1,
            "student_prompts_per_step": 8,
            "teacher_prompts_per_step": 8,
            "optimizer": {"learning_rate": 1e-3},
        },
        "pools": {
            pool: {"cpus": 0.2}
            for pool in ("student_rollout", "teacher_rollout", "teacher_scoring", "learner")
        },
        "cluster": {"dashboard": False},
    }
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump(form))
    run = start("sft", path).finish(START_SECONDS)
    assert run.code == 0, run.stderr


def _data() -> dict[str, Any]:
    embedded: dict[str, Any] = {"type": "embedded"}
    return {
        "prompt_template": "{prompt}<sep>",
        "max_prompt_tokens": 48,
        "prompts": embedded | {"split": "train", "num_examples": 400, "seed": 3},
        "held_out": embedded | {"split": "in_distribution", "num_examples": 8, "seed": 99},
        "evaluation": {
            "in_distribution": embedded
            | {"split": "in_distribution", "num_examples": 16, "seed": 7},
        },
    }


def _merge(form: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """One nested form over another."""
    merged = dict(form)
    for key, value in other.items():
        below = merged.get(key)
        inner = isinstance(below, dict) and isinstance(value, Mapping)
        merged[key] = _merge(below, value) if inner else value
    return merged
