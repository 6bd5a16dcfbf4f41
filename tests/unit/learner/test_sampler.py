"""The gap of sampler and learner: one number, whoever asks for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fakes.local_workers import LocalWorkers
from trajectories import make_trajectories

from distill_system.config.model import LearnerConfig
from distill_system.config.objective import MOMENTS
from distill_system.learner import LearnerGroup
from distill_system.records import Author, Stream, VersionSpan
from distill_system.scoring import ScoringPool


def _scored(scorer, on_policy):
    pool = ScoringPool(LocalWorkers([scorer]))
    streams = {Stream.OFF_POLICY: make_trajectories(4, Author.TEACHER), Stream.ON_POLICY: on_policy}
    return [
        chunk
        for stream, trajectories in streams.items()
        for chunk in pool.start(trajectories, stream, needs=MOMENTS, num_shares=1)
    ]


def _written_at(trajectory, version, *, shift=0.0):
    """The same text, recorded by an engine that holds this version and is off by this much."""
    span = VersionSpan(version=version, start=0, end=trajectory.num_response_tokens)
    logprobs = trajectory.behaviour_logprobs - np.float32(shift)
    return replace(trajectory, behaviour_logprobs=logprobs, weight_versions=(span,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_and_a_measurement_find_the_same_gap_and_the_same_distances(
    make_learner, scorer, dtype
):
    group = LearnerGroup(LocalWorkers([make_learner(config=LearnerConfig(compute_dtype=dtype))]))
    scored = _scored(scorer, [_written_at(t, 0) for t in make_trajectories(6)])
    measured = group.measure(scored)
    learned = group.learn(0, scored).metrics
    assert learned["learner/logprob_gap"] == pytest.approx(measured["logprob_gap"], rel=1e-9)
    for stream in ("off_policy", "on_policy"):
        found = learned[f"learner/{stream}_distance"]
        assert found == pytest.approx(measured[f"{stream}_distance"], rel=1e-5)


def test_text_that_an_earlier_student_wrote_is_no_part_of_the_gap(make_learner, scorer):
    """A replay brings such text to a run in lockstep too."""
    texts = make_trajectories(6)
    fresh, old = texts[:3], texts[3:]
    mixed = [_written_at(t, 5) for t in fresh] + [_written_at(t, 4, shift=9.0) for t in old]
    gaps = {}
    for name, written in {"mixed": mixed, "fresh": mixed[:3], "old": mixed[3:]}.items():
        group = LearnerGroup(LocalWorkers([make_learner()]))
        gaps[name] = group.learn(5, _scored(scorer, written)).metrics.get("learner/logprob_gap")
    assert gaps["mixed"] == pytest.approx(gaps["fresh"], rel=1e-6)
    assert gaps["old"] is None
