from __future__ import annotations

from functools import partial

import pytest
from fakes.forked_workers import ForkedWorkers
from one_rank import one_rank

from distill_system.config.objective import AmmdConfig
from distill_system.config.rollout import ScoringConfig
from distill_system.learner import LearnerGroup, ModelSource
from distill_system.scoring import TeacherScorer


@pytest.fixture
def make_learner(tiny_model_folder):
    """A learner rank on a tiny student, distilled from a wider tiny teacher."""

    def make(*, objective="ammd", source=None, **changes):
        teacher = tiny_model_folder(hidden_size=96, num_heads=3, seed=1)
        own = ModelSource(
            path=str(tiny_model_folder(seed=2)),
            teacher_path=None if objective is None else str(teacher),
        )
        chosen = AmmdConfig() if objective == "ammd" else objective
        return one_rank(source or own, objective=chosen, **changes)

    return make


@pytest.fixture
def make_ranks(make_learner):
    """Learner ranks in processes of their own, which have met; ended with the test."""
    made = []

    def make(count, **changes):
        makers = [
            partial(make_learner, rank=rank, world_size=count, **changes) for rank in range(count)
        ]
        made.append(ForkedWorkers(makers))
        LearnerGroup(made[-1]).connect()
        return made[-1]

    yield make
    for workers in made:
        workers.stop()


@pytest.fixture
def scorer(tiny_model_folder):
    return TeacherScorer(
        model_path=str(tiny_model_folder(hidden_size=96, num_heads=3, seed=1)),
        config=ScoringConfig(max_tokens_per_batch=64),
        vocabulary_chunk_tokens=7,
        uses_gpu=False,
    )
