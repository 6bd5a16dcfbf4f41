"""What learner steps and measurements report, against the tables of docs/metrics.md."""

from __future__ import annotations

import pytest
from fakes.local_workers import LocalWorkers
from metric_names import documented_metrics
from trajectories import make_trajectories

from distill_system.config.distill import StalenessConfig
from distill_system.config.model import LearnerConfig
from distill_system.config.objective import (
    HELD_OUT,
    AmmdConfig,
    MinillmConfig,
    PreferenceConfig,
    TokenMatchingConfig,
)
from distill_system.config.objective.ammd import AdvantageConfig
from distill_system.config.objective.token_losses import ReverseKlConfig
from distill_system.config.objective.token_matching import HiddenMatchingConfig, RelationalConfig
from distill_system.learner import LearnerGroup
from distill_system.records import Author, ScoredChunk, Stream, TrajectoryChunk
from distill_system.scoring import ScoringPool

REVERSE_KL = ReverseKlConfig(type="reverse_kl")
OBJECTIVES = (
    AmmdConfig(advantage=AdvantageConfig(type="soft_advantage")),
    TokenMatchingConfig(
        type="token_matching",
        off_policy=REVERSE_KL,
        on_policy=REVERSE_KL,
        terms=(
            RelationalConfig(type="relational"),
            HiddenMatchingConfig(type="hidden_matching"),
        ),
    ),
    MinillmConfig(type="minillm"),
    PreferenceConfig(type="preference"),
)
"""One of each kind, with everything on that has a metric of its own."""

OF_THE_DRIVER = {
    "learner/peak_memory_bytes",
    "learner/mean_staleness",
    "learner/max_staleness",
    "held_out/forward_kl",
}
"""Named so, but put in by the recorder, the streams and the driver's measuring."""


def _scored(scorer, ask):
    """ask: stream -> what the teacher is asked."""
    pool = ScoringPool(LocalWorkers([scorer]))
    parts = [
        (make_trajectories(8, Author.TEACHER), Stream.OFF_POLICY),
        (make_trajectories(8, first=100), Stream.ON_POLICY),
    ]
    return [
        chunk
        for texts, stream in parts
        for chunk in pool.start(texts, stream, needs=ask(stream.value), num_shares=1)
    ]


def _step(make_learner, scorer, objective, **settings):
    settings |= {"objective": objective, "language_model_weight": 0.5}
    group = LearnerGroup(LocalWorkers([make_learner(**settings)]))
    texts = TrajectoryChunk(
        stream=Stream.PLAIN_TEXT, trajectories=tuple(make_trajectories(2, Author.DATASET, 200))
    )
    scored = [*_scored(scorer, objective.teacher_needs), ScoredChunk(texts, None)]
    return set(group.learn(3, scored).metrics)


@pytest.fixture
def reported(make_learner, scorer):
    """Names that steps of every kind report: of fresh and older text, whole and in parts."""
    older = {"staleness": StalenessConfig(max_staleness=2, importance="state")}
    names = set()
    for objective in OBJECTIVES:
        names |= _step(make_learner, scorer, objective)
        names |= _step(
            make_learner,
            scorer,
            objective,
            config=LearnerConfig(max_tokens_per_microbatch=64),
            **older,
        )
    return names


def test_steps_report_what_is_documented_and_nothing_else(reported):
    documented = {name for name in documented_metrics() if name.startswith("learner/")}
    assert reported == documented - OF_THE_DRIVER


def test_measurements_report_what_is_documented_and_nothing_else(make_learner, scorer):
    group = LearnerGroup(LocalWorkers([make_learner()]))
    measured = {f"held_out/{name}" for name in group.measure(_scored(scorer, lambda _: HELD_OUT))}
    documented = {name for name in documented_metrics() if name.startswith("held_out/")}
    assert measured == documented - OF_THE_DRIVER
