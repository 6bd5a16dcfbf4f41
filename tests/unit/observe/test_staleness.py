from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trajectories import make_trajectory

from distill_system.errors import RecordError
from distill_system.observe.metrics import MetricLog, read_metrics
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.text_figures import staleness_metrics, summarise_staleness
from distill_system.records import Author, Trajectory, VersionSpan


def written(versions: list[int]) -> Trajectory:
    """A trajectory whose token t was sampled from version versions[t]."""
    spans = tuple(
        VersionSpan(version=version, start=at, end=at + 1) for at, version in enumerate(versions)
    )
    return replace(make_trajectory(0, 3, len(versions)), weight_versions=spans)


@given(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=6), min_size=1, max_size=5))
def test_ages_are_those_of_the_single_tokens(versions):
    metrics = staleness_metrics([written(tokens) for tokens in versions], 9, max_staleness=3)
    ages = 9 - np.concatenate(versions)
    assert metrics["learner/mean_staleness"] == pytest.approx(ages.mean())
    assert metrics["learner/max_staleness"] == ages.max()
    for age in range(4):
        assert metrics[f"staleness/share_{age}"] == pytest.approx((ages == age).mean())
    assert metrics["staleness/share_older"] == pytest.approx((ages > 3).mean())
    assert metrics["staleness/tokens"] == ages.size


def test_text_that_the_student_did_not_write_has_no_age():
    others = [make_trajectory(1, 2, 5, Author.TEACHER), make_trajectory(2, 2, 5, Author.DATASET)]
    assert staleness_metrics(others, 9, num_dropped=1) == {"staleness/dropped": 1.0}


@pytest.mark.parametrize("versions", [[7, 8, 10], []])
def test_tokens_from_the_future_or_without_a_version_are_refused_by_their_trajectory(versions):
    trajectory = written(versions) if versions else written([7])
    if not versions:
        trajectory = replace(trajectory, weight_versions=())
    with pytest.raises(RecordError, match=r"'t0': expected .* learner's, 9"):
        staleness_metrics([trajectory], 9)


def test_a_run_is_summed_up_token_by_token_and_not_step_by_step(tmp_path: Path):
    steps = {1: [[1, 1]], 2: [[1, 2, 2, 2, 2, 2], [2, 2]], 3: [[1, 3]]}
    run = RunDirectory(tmp_path)
    with MetricLog(run, run_name="r") as log:
        log.log("sft_student", 1, {"learner/loss": 1.0})
        for version, versions in steps.items():
            trajectories = [written(tokens) for tokens in versions]
            metrics = staleness_metrics(trajectories, version, max_staleness=1, num_dropped=version)
            log.log("distill", version, metrics)
    ages = np.array([0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0])
    assert summarise_staleness(read_metrics(run)) == {
        "mean": pytest.approx(ages.mean()),
        "max": 2.0,
        "shares": {
            "0": pytest.approx(10 / 12),
            "1": pytest.approx(1 / 12),
            "older": pytest.approx(1 / 12),
        },
        "dropped": 6,
    }


def test_ages_of_two_digits_stand_after_those_of_one(tmp_path: Path):
    run = RunDirectory(tmp_path)
    with MetricLog(run, run_name="r") as log:
        log.log("distill", 1, staleness_metrics([written([1])], 11, max_staleness=10))
    summary = summarise_staleness(read_metrics(run))
    assert summary is not None
    assert list(summary["shares"]) == [*map(str, range(11)), "older"]
    assert summary["shares"]["10"] == 1.0


def test_a_run_without_such_metrics_has_no_ages(tmp_path: Path):
    run = RunDirectory(tmp_path)
    with MetricLog(run, run_name="r") as log:
        log.log("distill", 1, {"learner/loss": 1.0})
    assert summarise_staleness(read_metrics(run)) is None
