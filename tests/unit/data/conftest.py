import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from distill_system.config.run import RunConfig

ARCHITECTURE = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1}
SUPERVISED = {"steps": 1, "optimizer": {"learning_rate": 1e-3}}
MODEL = {"architecture": ARCHITECTURE, "sft": SUPERVISED}


def embedded(split: str, num_examples: int, seed: int = 0) -> dict[str, Any]:
    return {"type": "embedded", "split": split, "num_examples": num_examples, "seed": seed}


@pytest.fixture
def build_config() -> Callable[..., RunConfig]:
    """A valid configuration of the embedded tasks, with sections of it replaced."""

    def build(*, data: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
        rows = {
            "prompt_template": "{prompt}<sep>",
            "max_prompt_tokens": 300,
            "teacher_sft": embedded("train", 40, 0),
            "student_sft": embedded("train", 20, 1),
            "prompts": embedded("train", 30, 2),
            "held_out": embedded("in_distribution", 10, 3),
            "evaluation": {"paraphrase": embedded("paraphrase", 10, 4)},
        }
        values: dict[str, Any] = {
            "name": "test",
            "tokenizer": {"type": "embedded"},
            "data": rows | (data or {}),
            "teacher": MODEL,
            "student": MODEL,
            "rollout": {"sampling": {"max_response_tokens": 24}},
            "distill": {"steps": 1, "optimizer": {"learning_rate": 1e-3}},
        }
        return RunConfig.model_validate(values | sections)

    return build


@pytest.fixture
def build_long_config(build_config: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """The same for models of longer sequences and a tokenizer of one's own."""
    long = {**MODEL, "architecture": {**ARCHITECTURE, "max_position_embeddings": 4096}}
    trained = {"type": "train_bpe", "vocab_size": 300}

    def build(**data: Any) -> RunConfig:
        data = {"max_prompt_tokens": 2000, "chat_date": "2026-03-01"} | data
        return build_config(data=data, tokenizer=trained, teacher=long, student=long)

    return build


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[[str, Sequence[object]], Path]:
    def write(name: str, rows: Sequence[object]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
