"""The offline generator with real Ray Data and real vLLM: killed half-way, gone on with, read."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet
import torch
from pipeline.command_line import Run, wait_until, write_configuration
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_system.data import TargetStore, fingerprint_tokenizer, read_trajectories

NUM_SAMPLES = 60 * 20
ASK = ("--samples-per-prompt", 20, "--cache-targets")


def _teacher_says(folder: Path, trajectory) -> np.ndarray:
    """float32 [T]: log-probabilities of a response's tokens, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(trajectory.token_ids, dtype=torch.long)
    with torch.no_grad():
        logprobs_LV = model(ids[None]).logits[0].log_softmax(-1)
    said = logprobs_LV[:-1].gather(1, ids[1:, None])[:, 0].numpy()
    return said[trajectory.num_prompt_tokens - 1 :]


def test_a_killed_generation_goes_on_and_writes_no_sample_twice(
    tmp_path: Path, launch: Callable[..., Run], tiny_model_folder: Callable[..., Path]
) -> None:
    teacher, student = tiny_model_folder(seed=1), tiny_model_folder(seed=2, num_layers=1)
    configuration = write_configuration(tmp_path, teacher, student)
    parts = tmp_path / "store" / "trajectories"
    arguments = (configuration, "data.trajectory_store=store", *ASK)

    killed = launch("generate", *arguments)
    wait_until(lambda: list(parts.glob("part-*.parquet")), killed)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.end()
    first = {path: path.stat().st_mtime_ns for path in parts.glob("part-*.parquet")}
    done = sum(pyarrow.parquet.read_metadata(path).num_rows for path in first)
    assert 0 < done < NUM_SAMPLES

    again = launch("generate", *arguments).finish()
    assert again.code == 0, again.stderr
    assert f"{NUM_SAMPLES} samples asked for, {done} are in the store already" in again.stderr
    assert "GiB" in again.stderr, "the cost of the targets is told"
    assert "tok/s" in again.stderr
    assert "core_worker.cc" not in again.stderr, "Ray's own lines are in its log"
    assert again.orphans() == []
    assert first == {path: path.stat().st_mtime_ns for path in first}, "what stood there stays"

    rows = datasets.load_dataset(
        "parquet", data_dir=str(parts), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(rows) == len(set(rows["key"])) == NUM_SAMPLES
    assert len(set(rows["prompt_key"])) == 60
    prompts = [
        json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()
    ]
    assert set(rows["prompt_text"]) == set(prompts)

    fingerprint = fingerprint_tokenizer(AutoTokenizer.from_pretrained(teacher))
    stored = read_trajectories(tmp_path / "store", fingerprint)
    trajectory = stored[0]
    said = _teacher_says(teacher, trajectory)
    np.testing.assert_allclose(trajectory.behaviour_logprobs, said, atol=1e-4)
    rows = pyarrow.parquet.read_table(tmp_path / "store" / "targets", columns=["reading"])
    assert rows.num_rows == NUM_SAMPLES
    [reading] = set(rows["reading"].to_pylist())
    targets = TargetStore(tmp_path / "store", reading)
    assert all(stored.key(index) in targets for index in range(NUM_SAMPLES))
    [kept] = targets.read([stored.key(0)], [trajectory.trajectory_id])
    assert kept.features.shape == (trajectory.num_response_tokens, 64)
    _select(configuration, launch, teacher, student)


def _select(configuration: Path, launch: Callable[..., Run], teacher: Path, student: Path) -> None:
    """Half of the rows with answers, by two models in Ray's workers: those that plain transformers
    would keep."""
    out = configuration.parent / "selected"
    rows = "data.student_sft={type: jsonl, path: prompts.jsonl}"
    run = launch("select", configuration, rows, "--reference", student, "--out", out).finish()
    assert run.code == 0, run.stderr
    assert "30 of 60 rows kept" in run.stdout
    kept = [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()]
    tokenizer, given = AutoTokenizer.from_pretrained(teacher), []
    for line in (configuration.parent / "prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, answer = (tokenizer(row[name])["input_ids"] for name in ("prompt", "response"))
        ids = np.array([*prompt, *answer[-1:], tokenizer.eos_token_id], np.int32)
        read = SimpleNamespace(token_ids=ids, num_prompt_tokens=len(prompt))
        said = [_teacher_says(folder, read).mean() for folder in (teacher, student)]
        given.append((said[0] - said[1], row["prompt"]))
    best = {prompt for _, prompt in sorted(given)[-30:]}
    assert {row["prompt"] for row in kept} == best
    scores = {prompt: score for score, prompt in given}
    for row in kept:
        assert abs(row["score"] - scores[row["prompt"]]) < 1e-4
