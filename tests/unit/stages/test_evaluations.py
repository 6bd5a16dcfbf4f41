"""Which evaluations of a finished run are made again, and which stand."""

from __future__ import annotations

import json

import pytest

from distill_system.errors import ModelError, RunStateError
from distill_system.observe import RunDirectory
from distill_system.run.preparation import open_run, record_start
from distill_system.stages.evaluate_model import evaluate_model
from distill_system.stages.evaluations import (
    describe_standing,
    find_lacking,
    find_steps,
    wanted_metrics,
)
from distill_system.stages.train import train


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "runs/run")


def _write(run, label, *metrics, step=3, split="test"):
    names = [f"{name}_{how}" for name in metrics for how in ("greedy", "sampled")]
    scores = {name: {"mean": 1.0, "stderr": None} for name in [*names, "mean_length_greedy"]}
    others = {"prompt_ids": ["a"], "per_example": {}, "bootstrap": {}, "shown": []}
    splits = {split: {"num_examples": 1, "scores": scores, **others}}
    form = {"label": label, "step": step, "splits": splits, "distances": None}
    run.evaluations_directory.mkdir(parents=True, exist_ok=True)
    run.evaluation_path(label).write_text(json.dumps(form))


def _metrics(*names):
    return f"evaluation.metrics=[{', '.join(names)}]"


def _export(run):
    """As far as anybody looks at a model that stands there."""
    run.student_directory.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (run.student_directory / name).write_text("{}")


def test_what_is_missing_or_lacks_a_metric_is_made(configure, run):
    rouge = configure(_metrics("rouge_l"))
    assert find_lacking(rouge, run) == ["before", "after"]
    _write(run, "teacher", "rouge_l")
    _write(run, "after", "rouge_l", "bleu")
    assert find_lacking(rouge, run) == ["before"]
    assert find_lacking(configure(_metrics("bleu")), run) == ["teacher", "before"]
    _write(run, "before", "rouge_l")
    assert find_lacking(rouge, run) == []
    assert find_lacking(configure(_metrics("rouge_l", "bleu")), run) == ["teacher", "before"]


def test_prompts_without_references_lack_no_metric(configure, run):
    for label in ("teacher", "before", "after"):
        _write(run, label)
    assert find_lacking(configure(_metrics("bleu")), run) == []


def test_metrics_that_stand_already_are_measured_again_with_the_new_ones(configure, run):
    _write(run, "before", "rouge_l", "accuracy")
    assert wanted_metrics(configure(_metrics("bleu")), run) == ("bleu", "rouge_l", "accuracy")
    assert wanted_metrics(configure(_metrics("rouge_l")), run) == ("rouge_l", "accuracy")


def test_the_steps_behind_the_student_are_those_it_was_evaluated_at(configure, run):
    config = configure("distill.steps=50")
    assert find_steps(config, run) == 50
    _write(run, "after", "rouge_l", step=12)
    assert find_steps(config, run) == 12


def test_a_person_who_asks_for_what_stands_is_told_so(configure, run):
    config = configure(_metrics("rouge_l"))
    _export(run)
    for label in ("teacher", "before", "after"):
        _write(run, label, "rouge_l")
    record_start(config, run)
    said: list[str] = []
    train(config, stages=("evaluate",), notify=said.append)
    assert said == [f"nothing to evaluate: {describe_standing(run)}"]
    assert "teacher, before, after stand in" in said[0]
    assert "with rouge_l. Other metrics: evaluation.metrics" in said[0]


def test_other_sets_of_a_finished_run_are_refused_with_the_way_to_evaluate_them(configure, run):
    config = configure()
    _export(run)
    record_start(config, run)
    other = configure("data.evaluation.more={type: jsonl, path: rows.jsonl}")
    with pytest.raises(RunStateError, match=r"evaluate \.\.\. --model .*/runs/run`$"):
        open_run(other)
    with pytest.raises(RunStateError, match=r"remove .*/runs/run$"):
        open_run(configure("seed=7"))


def test_a_model_that_is_not_there_is_refused_before_any_worker(configure, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json in it"):
        evaluate_model(configure(), str(tmp_path / "empty"))
