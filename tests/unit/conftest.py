"""Configurations of runs on models that need no training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_system.config import RunConfig, load_config

Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Configure:
    """A run of two pretrained models of one tokenizer, with dotted overrides on top."""
    rows = [json.dumps({"prompt": f"w{index} w5", "response": "w6"}) for index in range(4, 16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "other.jsonl").write_text('{"prompt": "w40 w41", "response": "w42"}\n')
    rows_of: dict[str, Any] = {"type": "jsonl", "path": "rows.jsonl"}
    others = {"type": "jsonl", "path": "other.jsonl"}
    tree = {
        "name": "run",
        "runs_directory": str(tmp_path / "runs"),
        "data": {
            "directory": str(tmp_path),
            "max_prompt_tokens": 8,
            "prompts": rows_of,
            "held_out": others,
            "evaluation": {"test": others},
        },
        "teacher": {"path": str(tiny_model_folder(seed=1))},
        "student": {"path": str(tiny_model_folder(seed=2, num_layers=1))},
        "rollout": {"sampling": {"max_response_tokens": 8}},
        "distill": {"steps": 3, "optimizer": {"learning_rate": 1e-3}},
        "cluster": {"dashboard": False},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))

    def build(*overrides: str) -> RunConfig:
        return load_config([path], overrides)

    return build
