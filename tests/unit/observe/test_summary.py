import math
from pathlib import Path

import pytest

from distill_system.observe.metrics import MetricLog
from distill_system.observe.run_directory import RunDirectory, read_json, write_json
from distill_system.observe.summary import write_evaluation, write_summary
from distill_system.observe.timings import Timings
from distill_system.records import PoolActivity

BEFORE = [100.0, 0.0, 0.0, 100.0]
AFTER = [100.0, 100.0, 0.0, 100.0]


class Split:
    """The JSON form of a SplitEvaluation, without the evaluation room."""

    def __init__(self, values: list[float], replicates: list[float], first_id: str = "p0") -> None:
        self._values, self._replicates, self._first_id = values, replicates, first_id

    def to_json(self) -> dict[str, object]:
        return {
            "num_examples": len(self._values),
            "scores": {
                "exact_match_greedy": {"mean": sum(self._values) / 4, "stderr": 5.0},
                "bleu_greedy": {"mean": self._replicates[0], "stderr": 1.0},
            },
            "prompt_ids": [self._first_id, "p1", "p2", "p3"],
            "per_example": {"exact_match_greedy": self._values},
            "bootstrap": {"bleu_greedy": self._replicates},
            "shown": [],
        }


def write_run(path: Path) -> RunDirectory:
    run = RunDirectory(path)
    write_json(run.config_path, {"name": "tiny"})
    write_json(run.environment_path, {"versions": {"torch": "2"}, "seeds": {"run": 1}})
    write_json(run.timings_path, {"seconds": {"distill": 9.0}, "tokens_per_second": {"learner": 5}})
    run.metrics_path.touch()
    splits = {
        "teacher": Split([100.0] * 4, [90.0, 91.0, 92.0]),
        "before": Split(BEFORE, [50.0, 51.0, 55.0]),
        "after": Split(AFTER, [60.0, 62.0, 64.0]),
    }
    distances = {
        "teacher": None,
        "before": {"on_policy": 0.02, "off_policy": 0.01, "cross_entropy": 3.5, "forward_kl": 1.5},
        "after": {"on_policy": 0.015, "off_policy": 0.009, "cross_entropy": 2.5},
    }
    for label, split in splits.items():
        write_evaluation(
            run,
            label,
            step=200 if label == "after" else 0,
            weight_version=None if label == "teacher" else 0,
            splits={"in_distribution": split},
            distances=distances[label],
        )
    return run


def test_the_summary_has_the_shape_programs_read(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_summary(run)
    summary = read_json(run.summary_path)
    score = summary["scores"]["in_distribution"]["exact_match_greedy"]
    assert score == {
        "before": 50.0,
        "after": 75.0,
        "teacher": 100.0,
        "num_examples": 4,
        "stderr": 5.0,
        "stderr_before": 5.0,
        "stderr_teacher": 5.0,
        "gain": 25.0,
        "gain_stderr": pytest.approx(25.0),  # differences 0, 100, 0, 0: deviation 50, over sqrt(4)
    }
    assert summary["distances"] == {
        "cross_entropy": {"before": 3.5, "after": 2.5},
        "forward_kl": {"before": 1.5, "after": None},
        "on_policy": {"before": 0.02, "after": 0.015},
        "off_policy": {"before": 0.01, "after": 0.009},
    }
    assert next(iter(summary["distances"])) == "cross_entropy", "what every objective is after"
    assert summary["seconds"] == {"distill": 9.0}
    assert summary["tokens_per_second"] == {"learner": 5}
    assert summary["versions"] == {"torch": "2"}
    assert summary["seeds"] == {"run": 1}
    assert (summary["run"], summary["step"], summary["missing"]) == ("tiny", 200, [])


def test_the_gain_of_a_corpus_score_is_paired_by_replicate(tmp_path: Path) -> None:
    score = write_summary(write_run(tmp_path))["scores"]["in_distribution"]["bleu_greedy"]
    # Differences 10, 11, 9 have a standard deviation of 1; unpaired it would be over 3.
    assert score["gain_stderr"] == pytest.approx(1.0)


def test_evaluations_of_different_prompts_are_not_paired(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    other = {"in_distribution": Split(AFTER, [60.0, 62.0, 64.0], first_id="other")}
    write_evaluation(run, "after", step=1, weight_version=1, splits=other, distances=None)
    summary = write_summary(run)
    score = summary["scores"]["in_distribution"]["exact_match_greedy"]
    assert score["gain"] == 25.0
    assert score["gain_stderr"] is None
    assert summary["distances"]["on_policy"] == {"before": 0.02, "after": None}


def test_a_run_in_parts_is_summarised_and_says_what_it_lacks(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    run.evaluation_path("before").unlink()
    run.timings_path.unlink()
    summary = write_summary(run)
    score = summary["scores"]["in_distribution"]["exact_match_greedy"]
    assert (score["before"], score["after"], score["gain"]) == (None, 75.0, None)
    assert summary["missing"] == ["timings.json", "evaluations/before.json"]


def test_a_score_that_is_not_finite_is_null_in_the_file(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    write_evaluation(
        run, "after", step=0, weight_version=0, splits={}, distances={"on_policy": math.nan}
    )
    assert read_json(run.evaluation_path("after"))["distances"] == {"on_policy": None}


def add_pools(run: RunDirectory) -> None:
    """A streaming run's time: 2 student rollouts always busy, a learner half of the time."""
    timings = Timings(run)
    for busy in (30.0, 10.0):
        student = PoolActivity(num_workers=2, seconds=busy / 2, busy_seconds=busy)
        learner = PoolActivity(
            num_workers=1, seconds=busy / 2, busy_seconds=busy / 4, starved_seconds=busy / 4
        )
        timings.add_activity({"student_rollout": student, "learner": learner})
    timings.save()


def test_the_summary_says_what_the_pools_did_and_which_bounds_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    run.timings_path.unlink()
    add_pools(run)
    write_json(run.config_path, {"distill": {"staleness": {"max_staleness": 1}}})
    with MetricLog(run, run_name="tiny") as log:
        log.log("distill", 1, {"staleness/tokens": 4, "staleness/share_1": 1.0})
    summary = write_summary(run)
    assert summary["pools"]["student_rollout"] == {
        "num_workers": 2,
        "busy_share": 1.0,
        "starved_share": 0.0,
        "blocked_share": 0.0,
        "num_tokens": 0,
        "num_sequences": 0,
    }
    assert summary["pools"]["learner"]["starved_share"] == 0.5
    assert summary["bottleneck"].startswith(
        "student_rollout bounds the run (100% busy, learner waits 50% of the time for it): "
        "one more worker would bring 1.50x"
    )
    assert summary["staleness"]["shares"] == {"1": 1.0}


def test_a_run_that_kept_no_pools_has_none_in_its_summary(tmp_path: Path) -> None:
    summary = write_summary(write_run(tmp_path))
    assert (summary["pools"], summary["bottleneck"], summary["staleness"]) == ({}, None, None)
