"""`distill-system init`: what it writes is read back, fits its data, and would start here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
from typer.testing import CliRunner

from distill_system.cli import app
from distill_system.cluster import supply
from distill_system.config import load_config
from distill_system.config.data import FilesSource


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(count: int, *, answers: bool = True) -> list[dict[str, Any]]:
    """Prompts of two to five words, all different; answers of one to three."""
    rows = []
    for at in range(count):
        words = [f"w{4 + at % 50}", f"w{4 + at // 50}", *["w9"] * (at % 4)]
        row: dict[str, Any] = {"prompt": " ".join(words)}
        if answers:
            row["response"] = " ".join(["w7"] * (1 + at % 3))
        rows.append(row)
    return rows


@pytest.fixture
def init(tmp_path, tiny_model_folder):
    teacher, student = tiny_model_folder(seed=1), tiny_model_folder(seed=2, num_layers=1)

    def run(data: Path, *options: str, name: str = "mine"):
        output = tmp_path / f"{name}.yaml"
        arguments = ["init", str(teacher), str(student), str(data), "--output", str(output)]
        return CliRunner().invoke(app, [*arguments, *options]), output

    return run


def test_what_is_written_fits_its_rows_and_passes_the_plan(init, tmp_path, monkeypatch):
    for cpus in (2.0, 64.0):
        monkeypatch.setattr(supply, "get_num_cpus", lambda cpus=cpus: cpus)
        done, output = init(_write(tmp_path / "rows.jsonl", _rows(120)), name=f"of-{cpus:g}")
        assert done.exit_code == 0, done.output
        assert f"next: distill-system plan {output}" in done.stdout
        config = load_config([output])
        asked = sum(pool.count * pool.cpus for pool in config.pools.by_name.values())
        assert asked <= cpus
    assert config.name == "of-64"
    assert (config.data.max_prompt_tokens, config.rollout.sampling.max_response_tokens) == (8, 8)
    test, held_out, prompts = (
        config.data.evaluation["test"],
        config.data.held_out,
        config.data.prompts,
    )
    sources = [s for s in (test, held_out, prompts) if isinstance(s, FilesSource)]
    ranges = [(s.skip, s.num_examples) for s in sources]
    assert ranges == [(0, 12), (12, 12), (24, None)]
    assert config.distill.sequences("on_policy") == 32
    assert output.read_text().count("# ") > 8, "commented"


@pytest.mark.parametrize(("gpus", "share"), [(1, 0.25), (2, 0.5), (3, 0.5), (4, 1.0)])
def test_workers_share_the_gpus_that_there_are(init, tmp_path, monkeypatch, gpus, share):
    monkeypatch.setattr(
        NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", lambda: gpus
    )
    done, output = init(_write(tmp_path / "rows.jsonl", _rows(40)))
    assert done.exit_code == 0, done.output
    config = load_config([output])
    assert [pool.gpus for pool in config.pools.by_name.values()] == [share] * 4
    engines = (config.rollout.student_engine, config.rollout.teacher_engine)
    assert {engine.dtype for engine in engines} == {"bfloat16"}
    workers_a_gpu = round(1 / share)
    assert all(engine.gpu_memory_utilization * workers_a_gpu <= 0.9 for engine in engines)
    assert config.transfer_backend == ("gloo" if share < 1 else "nccl")


@pytest.mark.parametrize(
    ("rename", "longest"),
    [
        ({"response": "completion"}, 8),
        ({"prompt": "instruction", "response": "output"}, 8),
        ({"response": None}, 64),
    ],
)
def test_columns_of_the_usual_names_are_found(init, tmp_path, rename, longest):
    """Without answers to measure a response gets half of the context, at most."""
    rows = [
        {rename.get(key, key): value for key, value in row.items() if rename.get(key, key)}
        for row in _rows(40)
    ]
    done, output = init(_write(tmp_path / "rows.jsonl", rows))
    assert done.exit_code == 0, done.output
    assert load_config([output]).rollout.sampling.max_response_tokens == longest


def test_a_table_of_another_form_will_do(init, tmp_path):
    lines = [f"{row['prompt']},{row['response']}" for row in _rows(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["prompt,response", *lines]) + "\n")
    done, output = init(tmp_path / "rows.csv")
    assert done.exit_code == 0, done.output
    held_out = load_config([output]).data.held_out
    assert isinstance(held_out, FilesSource)
    assert held_out.path == "rows.csv"


def test_rows_that_the_models_have_no_room_for_are_left_out_and_told(init, tmp_path):
    rows = [*_rows(40), {"prompt": " ".join(["w9"] * 300), "response": "w7"}]
    done, output = init(_write(tmp_path / "rows.jsonl", rows))
    assert done.exit_code == 0, done.output
    config = load_config([output])
    assert config.data.max_prompt_tokens == 128 - 8
    assert "1 rows are left out" in output.read_text()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (("rows.txt", [{"prompt": "w4"}]), "rows.txt"),
        (("rows.jsonl", [{"title": 4}] * 20), "title"),
        (("rows.jsonl", [{"prompt": "w4", "response": "w5"}] * 9), "expected at least 10 rows"),
        (("rows.jsonl", []), "rows.jsonl"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_nothing_is_written(init, tmp_path, data, said):
    done, output = init(_write(tmp_path / data[0], data[1]))
    assert done.exit_code == 1
    assert said in done.stderr
    assert not output.exists()


def test_a_file_that_stands_is_not_overwritten(init, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: precious")
    done, output = init(_write(tmp_path / "rows.jsonl", _rows(40)))
    assert done.exit_code == 1
    assert "there is such a file" in done.stderr
    assert output.read_text() == "name: precious"
