"""A scorer that shares its GPU gives back, after each call, what torch would keep."""

import numpy as np
import pytest
import torch
from trajectories import make_trajectories

from distill_system.config.objective import TeacherNeeds
from distill_system.config.rollout import ScoringConfig
from distill_system.records import Stream, TrajectoryChunk
from distill_system.scoring import TeacherScorer


@pytest.mark.parametrize("shares_gpu", [True, False, None])
def test_memory_is_given_back_once_a_call_and_only_where_it_is_shared(
    tiny_model_folder, monkeypatch, shares_gpu
):
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    scorer = TeacherScorer(
        model_path=str(tiny_model_folder()),
        config=ScoringConfig(),
        vocabulary_chunk_tokens=8,
        uses_gpu=False,
        **({} if shares_gpu is None else {"shares_gpu": shares_gpu}),
    )
    chunk = TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=tuple(make_trajectories(4)))
    first, second = (scorer.score(chunk, TeacherNeeds(logprobs=True)) for _ in range(2))
    assert len(given_back) == (2 if shares_gpu else 0)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.logprobs, other.logprobs)
