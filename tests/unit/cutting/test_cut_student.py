"""The command that cuts a student: a folder that loads, and what it refuses before it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_families import save_family
from transformers import AutoModelForCausalLM

from distill_system.config import load_config
from distill_system.cutting import CutRequest, cut_student
from distill_system.errors import ConfigError, ModelError


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    teacher = save_family(tmp_path / "teacher", "llama", seed=1)
    rows = [{"prompt": f"w{5 + n} w6", "response": f"w7 w{8 + n} w9"} for n in range(8)]
    for name in ("rows", "held_out", "test"):
        text = "".join(
            json.dumps({**row, "prompt": f"{name[0]} {row['prompt']}"}) + "\n" for row in rows
        )
        (tmp_path / f"{name}.jsonl").write_text(text)
    plain = {"fields": {"response": None}}
    form = {
        "name": "cut",
        "runs_directory": str(tmp_path / "runs"),
        "data": {
            "directory": str(tmp_path),
            "max_prompt_tokens": 8,
            "student_sft": {"type": "jsonl", "path": "rows.jsonl"},
            "prompts": {"type": "jsonl", "path": "rows.jsonl", **plain},
            "held_out": {"type": "jsonl", "path": "held_out.jsonl", **plain},
            "evaluation": {"test": {"type": "jsonl", "path": "test.jsonl"}},
        },
        "teacher": {"path": str(teacher)},
        "student": {"path": str(tmp_path / "student")},
        "rollout": {"sampling": {"max_response_tokens": 8}},
        "distill": {
            "steps": 2,
            "student_prompts_per_step": 2,
            "teacher_prompts_per_step": 2,
            "optimizer": {"learning_rate": 1e-3},
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(form))
    return path


def test_the_folder_loads_and_says_what_was_kept(configuration: Path) -> None:
    report = cut_student(
        CutRequest(
            config=load_config([configuration]), num_layers=1, intermediate_size=40, num_rows=4
        )
    )
    student = AutoModelForCausalLM.from_pretrained(report.folder)
    assert student.config.num_hidden_layers == 1
    kept = json.loads((report.folder / "cut.json").read_text())["kept"]
    teacher = AutoModelForCausalLM.from_pretrained(configuration.parent / "teacher")
    columns = teacher.model.layers[kept["blocks_L"][0]].mlp.down_proj.weight[
        :, kept["neurons_LF"][0]
    ]
    assert torch.equal(student.model.layers[0].mlp.down_proj.weight, columns)
    assert (report.folder / "tokenizer.json").is_file()
    before, after = report.parameters
    assert after < before
    assert report.losses is not None
    assert report.losses[0] != report.losses[1]
    with pytest.raises(ConfigError, match="exists already: remove it"):
        cut_student(CutRequest(config=load_config([configuration]), num_layers=1))


def test_rows_are_needed_only_where_they_choose(configuration: Path) -> None:
    config = load_config([configuration], ["data.student_sft=null"])
    with pytest.raises(ConfigError, match=r"data\.student_sft: expected rows with responses"):
        cut_student(CutRequest(config=config, num_heads=1))
    assert cut_student(CutRequest(config=config, num_layers=1)).losses is None


def test_what_cannot_be_cut_is_told_and_nothing_is_written(configuration: Path) -> None:
    config = load_config([configuration])
    with pytest.raises(
        ModelError, match=r"num_layers: expected 1 to 2, got 3; hidden_size: expected"
    ):
        cut_student(CutRequest(config=config, num_layers=3, hidden_size=100))
    encoder = save_family(configuration.parent / "t5", "t5")
    config = load_config([configuration], [f"teacher.path={encoder}"])
    with pytest.raises(ModelError, match="students are cut from decoders alone"):
        cut_student(CutRequest(config=config, num_layers=1))
    assert not (configuration.parent / "student").exists()


def test_a_cut_of_nothing_is_refused(configuration: Path) -> None:
    with pytest.raises(ConfigError, match="cut: expected a size that is smaller"):
        cut_student(CutRequest(config=load_config([configuration]), blocks="important"))
    assert not (configuration.parent / "student").exists()
