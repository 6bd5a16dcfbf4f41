"""What a step tells of the student's own text: lengths, ends, and sampler against learner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes.local_workers import LocalWorkers
from trajectories import make_trajectories

from distill_system.config.objective import MOMENTS
from distill_system.learner import LearnerGroup
from distill_system.records import Author, Finish, Stream
from distill_system.scoring import ScoringPool

STEP = 3
"""Of make_trajectories: the version that wrote them, and so the one that learns from them here."""


def _written_by(learner, trajectory, error):
    """As a sampler records it that is wrong about the first token by `error` nats."""
    ids = torch.from_numpy(trajectory.token_ids).long()
    with torch.no_grad():
        logprobs = learner.model(input_ids=ids[None]).logits[0].log_softmax(-1)
    rows = logprobs[trajectory.num_prompt_tokens - 1 : -1]
    said = rows.gather(1, ids[trajectory.num_prompt_tokens :, None])[:, 0].numpy()
    said[0] += error
    return replace(trajectory, behaviour_logprobs=said.astype(np.float32))


def _learn(make_learner, scorer, *, errors, finishes):
    learner = make_learner()
    on_policy = [
        replace(_written_by(learner, trajectory, error), finish=finish)
        for trajectory, error, finish in zip(make_trajectories(4), errors, finishes, strict=True)
    ]
    pool = ScoringPool(LocalWorkers([scorer]))
    scored = [
        chunk
        for trajectories, stream in (
            (make_trajectories(4, Author.TEACHER), Stream.OFF_POLICY),
            (on_policy, Stream.ON_POLICY),
        )
        for chunk in pool.start(trajectories, stream, needs=MOMENTS, num_shares=1)
    ]
    metrics = LearnerGroup(LocalWorkers([learner])).learn(STEP, scored).metrics
    return metrics, sum(trajectory.num_response_tokens for trajectory in on_policy)


def test_errors_of_both_signs_between_sampler_and_learner_add_up(make_learner, scorer):
    metrics, num_tokens = _learn(
        make_learner, scorer, errors=(0.0, 0.5, -0.25, 0.0), finishes=[Finish.STOP] * 4
    )
    assert metrics["learner/logprob_gap"] == pytest.approx(0.75 / num_tokens, rel=1e-3)


def test_neither_a_cut_nor_an_aborted_response_has_ended_by_itself(make_learner, scorer):
    metrics, num_tokens = _learn(
        make_learner,
        scorer,
        errors=(0.0,) * 4,
        finishes=(Finish.ABORT, Finish.STOP, Finish.LENGTH, Finish.ABORT),
    )
    assert metrics["learner/student_ended_share"] == 0.25
    assert metrics["learner/mean_student_response_tokens"] == num_tokens / 4
