"""What a person does after a run: takes its best student, evaluates it again.

All of it without vLLM: the transformers engine writes, and nothing else may need the other one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.command_line import Run, without_vllm, write_configuration, write_rows
from pipeline.sabotage import sabotaged
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_system.observe import RunDirectory
from distill_system.observe.fault_log import read_faults

Launch = Callable[..., Run]


@pytest.fixture
def configuration(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> Path:
    teacher, student = tiny_model_folder(seed=1), tiny_model_folder(seed=2, num_layers=1)
    path = write_configuration(tmp_path, teacher, student)
    settings = _read(path)
    settings["rollout"]["engine"] = "transformers"
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture
def launch_without_vllm(launch: Launch, tmp_path: Path) -> Launch:
    return partial(launch, environment=without_vllm(tmp_path / "without_vllm"))


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_stops_early_and_exports_its_best_student_as_it_was_evaluated(
    configuration: Path, launch: Launch, launch_without_vllm: Launch
) -> None:
    """The rate is so high that the first step is the worst: with mode max the best one, not the
    last. Measured is what bfloat16 holds."""
    highest_loss = "metric: held_out/cross_entropy, mode: max"
    train = launch_without_vllm(
        "train",
        configuration,
        "distill.steps=30",
        "distill.optimizer.learning_rate=0.03",
        "distill.measure_every=1",
        f"distill.early_stopping={{{highest_loss}, patience: 2}}",
        f"distill.keep_best={{{highest_loss}}}",
        "export={dtype: bfloat16, weights: best}",
    ).finish()
    assert train.code == 0, train.stderr
    run = configuration.parent / "run"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line)["metrics"] for line in lines]
    _assert_engine_and_learner_read_alike(rows)
    losses = [row["held_out/cross_entropy"] for row in rows]
    best_step = max(range(len(losses)), key=losses.__getitem__)
    assert best_step > 0, "there is no checkpoint of step 0"
    assert len(losses) == best_step + 3 < 31, "two measurements without a gain after the best"
    assert "distill.early_stopping: held_out/cross_entropy was not better" in train.stderr

    after = _read(run / "evaluations/after.json")
    assert after["step"] == best_step
    best = run / f"checkpoints/distill/step_{after['step']:06d}"
    best_weights = load_file(best / "model/shard-00001-model-00001-of-00001.safetensors")
    exported = load_file(run / "student/model.safetensors")
    assert exported.keys() <= best_weights.keys()
    for name, weight in exported.items():
        assert torch.equal(weight, best_weights[name].bfloat16()), name
    assert _read(run / "student/config.json")["dtype"] == "bfloat16"

    # An independent reader of the exported folder writes what the evaluation says it wrote.
    model = AutoModelForCausalLM.from_pretrained(run / "student", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    for shown in after["splits"]["test"]["shown"]:
        ids = tokenizer(shown["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        written = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) == shown["greedy"]

    _evaluate_again(configuration, launch, run)


LOSSES = """
def break_rollouts(module):
    def before(self, prompts, sampling, seed, label):
        if is_worker("student_rollout-0") and label == "evaluation_sampled":
            die("student")

    wrap(module.RolloutWorker, "generate", before)

def break_learner(module):
    wrap(module.Learner, "measure", lambda *_: die_once("learner"))

PATCHES = {
    "distill_system.rollout.worker": break_rollouts,
    "distill_system.learner.learner": break_learner,
}
"""
"""Each evaluation loses its student's first worker, the first one its learner too."""


def _assert_engine_and_learner_read_alike(rows: list[dict[str, float]]) -> None:
    """After each update: the weights that the learner made are those that wrote the next text."""
    gaps = [row["learner/logprob_gap"] for row in rows[1:]]
    held_out = [row["held_out/max_logprob_gap"] for row in rows]
    assert max(gaps) < 1e-4
    assert max(held_out) < 1e-4
    assert all(row["learner/gradient_norm"] > 0 for row in rows[1:])


def _evaluate_again(configuration: Path, launch: Launch, run: Path) -> None:
    """The finished run by another metric; its student, by the run's folder, on another set.

    Workers are lost on the way, and replaced: what they had to do is done all the same.
    """
    launch = partial(launch, environment=sabotaged(configuration.parent / "losses", LOSSES))
    before = {label: _read(run / f"evaluations/{label}.json") for label in ("before", "after")}
    settings = _read(run / "config.json")
    (configuration.parent / "again.yaml").write_text(json.dumps(settings))
    again = (configuration.parent / "again.yaml", "evaluation.metrics=[bleu]")
    evaluate = launch("evaluate", *again).finish(seconds=300)
    assert evaluate.code == 0, evaluate.stderr
    for label, old in before.items():
        new = _read(run / f"evaluations/{label}.json")
        scores = new["splits"]["test"]["scores"]
        assert {"bleu_greedy", "exact_match_greedy", "rouge_l_sampled"} <= scores.keys()
        for name, score in old["splits"]["test"]["scores"].items():
            assert scores[name] == score, "the same text, by the same seeds"
        assert new["step"] == old["step"]
    assert "bleu_greedy" in _read(run / "summary.json")["scores"]["test"]
    faults = read_faults(RunDirectory(run))
    assert [(row.stage, row.event, row.worker) for row in faults] == [
        ("evaluate", "lost", "student_rollout-0"),
        ("evaluate", "replaced", "student_rollout-0"),
        ("evaluate", "lost", "learner-0"),
        ("evaluate", "restarted", "learner-0"),
        ("evaluate", "lost", "student_rollout-0"),
        ("evaluate", "replaced", "student_rollout-0"),
    ]

    write_rows(configuration.parent / "new.jsonl", 5, first=300)
    sets = "data.evaluation={new: {type: jsonl, path: new.jsonl}}"
    other = launch("evaluate", configuration, sets, "--model", run, "--out", run / "new.json")
    other.finish(seconds=300)
    assert other.code == 0, other.stderr
    found = _read(run / "new.json")
    assert found["model"] == str(run / "student")
    assert found["splits"]["new"]["num_examples"] == 5
    assert "scores of" in other.stdout
    assert "student_rollout-1 has taken the place of student_rollout-0" in other.stderr
