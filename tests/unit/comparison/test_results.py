from pathlib import Path

import pytest
from comparison_runs import make_plan, write_run, write_trial

from distill_system.comparison import read_plan, run_directory, write_plan
from distill_system.comparison.results import Column, read_comparison
from distill_system.errors import RunStateError

SCORES = {"easy": {"exact_match_greedy": [100.0, 0.0, 50.0], "bleu_greedy": [30.0, 29.0, 31.0]}}
GREEDY = Column("easy", "exact_match_greedy")


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = make_plan(["sft", "ammd"], [0, 1], failures={"sft/seed_1": "out of memory"})
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan


def test_a_plan_that_lacks_a_key_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"name": "trial"}')
    with pytest.raises(RunStateError, match=r"plan\.json, config: Field required"):
        read_plan(tmp_path)
    with pytest.raises(RunStateError, match="missing"):
        read_plan(tmp_path / "elsewhere")


def test_scores_come_with_what_pairs_them(tmp_path: Path) -> None:
    write_trial(tmp_path, make_plan(["sft"], [4]), {"sft": {4: SCORES}})
    comparison = read_comparison(tmp_path)
    run = comparison.runs["sft"][4]
    greedy, bleu = run.scores[GREEDY], run.scores[Column("easy", "bleu_greedy")]
    assert greedy.per_example_N is not None
    assert bleu.replicates_R is not None
    assert (greedy.mean, greedy.per_example_N.tolist()) == (50.0, [100.0, 0.0, 50.0])
    assert (bleu.mean, bleu.replicates_R.tolist()) == (30.0, [29.0, 31.0])
    assert bleu.per_example_N is greedy.replicates_R is None
    assert greedy.prompt_ids == ("p0", "p1", "p2")
    assert run.scores[Column("held_out", "off_policy_distance")].mean == 0.005
    assert run.references["before"][GREEDY] == 50.0
    assert comparison.problems == {}


def test_curves_hold_what_is_measured_on_held_out_data(tmp_path: Path) -> None:
    metrics = {"evaluation/easy/exact_match_greedy": 7.0, "learner/loss": 1.0}
    write_plan(tmp_path, make_plan(["sft"], [0]))
    write_run(tmp_path, "sft", 0, SCORES, metrics=metrics)
    assert read_comparison(tmp_path).runs["sft"][0].curves == {
        "held_out/on_policy_distance": ((0, 0.03), (10, 0.02), (20, 0.01)),
        "evaluation/easy/exact_match_greedy": ((0, 7.0), (10, 7.0), (20, 7.0)),
    }


def test_costs_are_summed_over_steps_and_peaks_are_not(tmp_path: Path) -> None:
    metrics = {
        "seconds/step": 1.5,
        "learner/response_tokens": 100.0,
        "sampled_tokens/student": 5.0,
        "sampled_tokens/teacher": 7.0,
        "learner/peak_memory_bytes": 1e6,
    }
    write_plan(tmp_path, make_plan(["sft"], [0]))
    write_run(tmp_path, "sft", 0, SCORES, metrics=metrics)
    assert read_comparison(tmp_path).runs["sft"][0].costs == {
        "stage_seconds": 70.0,
        "step_seconds": 3.0,
        "sampled_tokens": 24.0,  # by both models, in two steps
        "learner_tokens": 200.0,
        "learner_peak_memory_bytes": 1e6,
    }


def test_runs_that_failed_are_missing_or_are_damaged_are_named(tmp_path: Path) -> None:
    plan = make_plan(["sft", "ammd"], [0, 1, 2], failures={"sft/seed_1": "NonFiniteError: loss"})
    write_trial(tmp_path, plan, {"sft": {0: SCORES, 2: SCORES}, "ammd": {0: SCORES, 1: SCORES}})
    run_directory(tmp_path, "ammd", 1).evaluation_path("after").write_text("{")
    write_run(tmp_path, "sft", 2, SCORES, step=12)
    comparison = read_comparison(tmp_path)
    assert {name: list(runs) for name, runs in comparison.runs.items()} == {
        "sft": [0, 2],
        "ammd": [0],
    }
    assert comparison.problems["sft/seed_1"] == "NonFiniteError: loss"
    assert "after.json is not JSON" in comparison.problems["ammd/seed_1"]
    assert "not finished" in comparison.problems["ammd/seed_2"]
    assert comparison.problems["sft/seed_2"] == "evaluated after 12 steps, planned were 20"


def test_an_evaluation_of_another_shape_is_a_problem_of_that_run(tmp_path: Path) -> None:
    write_trial(tmp_path, make_plan(["sft"], [0]), {"sft": {0: SCORES}})
    run_directory(tmp_path, "sft", 0).evaluation_path("after").write_text('{"step": 20}')
    comparison = read_comparison(tmp_path)
    assert comparison.runs == {"sft": {}}
    assert "after.json, distances: Field required" in comparison.problems["sft/seed_0"]
