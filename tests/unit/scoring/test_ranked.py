"""A teacher shared by ranks says what one rank says of it, and no rank holds it whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes.forked_workers import ForkedPeers
from torch.distributed.tensor import DTensor
from trajectories import make_trajectories, make_trajectory

from distill_system.config.objective import TeacherNeeds
from distill_system.config.rollout import ScoringConfig
from distill_system.errors import NonFiniteError
from distill_system.records import Stream, TeacherTargets, Trajectory, TrajectoryChunk
from distill_system.scoring import RankedScorer, TeacherScorer

EVERYTHING = TeacherNeeds(features=True, expected_embedding=True, logprobs=True, top_k=3)
SIGNALS = ("features", "expected_embedding", "logprobs", "top_k_ids", "top_k_logprobs")
POISON = 9
ALONE = "DISTILL_SYSTEM_RANKS_ALONE"
"""In the environment of a process that runs this file alone."""


class TaughtScorer(RankedScorer):
    """A rank that can be looked at and spoiled."""

    def held(self) -> int:
        """Numbers of the model and of the action embeddings that this rank holds now."""
        tensors = [*self.model.parameters(), self.action_embeddings_VE]
        assert all(isinstance(tensor, DTensor) for tensor in tensors)
        return sum(tensor.to_local().numel() for tensor in tensors)

    def spoil(self, token: int) -> None:
        """Every sequence with this token gets hidden states that are not finite."""
        weight = self.model.get_input_embeddings().weight
        rows = -(-weight.shape[0] // self.ranks.world_size)
        if token // rows == self.ranks.rank:
            weight.to_local()[token % rows] = float("inf")


def _arguments(folder: Path, config: ScoringConfig) -> dict[str, Any]:
    return {
        "model_path": str(folder),
        "config": config,
        "vocabulary_chunk_tokens": 5,
        "uses_gpu": False,
        "vocabulary_size": 66,
        "action_dimension": 8,
    }


Scorers = Callable[..., TaughtScorer]


@pytest.fixture
def shared() -> Iterator[Scorers]:
    """A scorer of several ranks, the first of which is this process."""
    if ALONE not in os.environ:
        pytest.skip("in a process of its own, by the last test of this file")
    made: list[tuple[TaughtScorer, ForkedPeers]] = []

    def make(folder: Path, num_ranks: int, **config: Any) -> TaughtScorer:
        def build(peers: ForkedPeers | None, rank: int) -> TaughtScorer:
            arguments = _arguments(folder, ScoringConfig(shard_ranks=num_ranks, **config))
            return TaughtScorer(
                num_ranks=num_ranks, timeout_seconds=60.0, peers=peers, rank=rank, **arguments
            )

        peers = ForkedPeers([partial(build, None, rank) for rank in range(1, num_ranks)])
        made.append((build(peers, 0), peers))
        made[-1][0].ready()
        return made[-1][0]

    yield make
    for scorer, peers in made:
        peers.stop()
        scorer.ranks.close()


def _chunk(trajectories: list[Trajectory]) -> TrajectoryChunk:
    return TrajectoryChunk(stream=Stream.ON_POLICY, trajectories=tuple(trajectories))


def _assert_alike(
    one: list[TeacherTargets], other: list[TeacherTargets], *, tolerance: float
) -> None:
    assert [each.trajectory_id for each in one] == [each.trajectory_id for each in other]
    for left, right in zip(one, other, strict=True):
        for name in SIGNALS:
            ours, theirs = getattr(left, name), getattr(right, name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=tolerance)


# Uneven shares of one size of group in one test alone: the other ranks are forked from this
# process, in which torch remembers how large the first one's are.
@pytest.mark.parametrize(
    ("num_ranks", "tied", "count"), [(2, True, 15), (3, False, 15), (4, True, 1)]
)
def test_what_ranks_say_together_is_what_one_says_and_each_holds_its_part(
    shared: Scorers, tiny_model_folder: Any, num_ranks: int, tied: bool, count: int
) -> None:
    """With one sequence three of four ranks have nothing to read, and still take part. It is then
    packed as one rank packs it, and every bit is the same; else sums are of another order."""
    folder = tiny_model_folder(vocab_size=70, tie_word_embeddings=tied)
    whole = TeacherScorer(**_arguments(folder, ScoringConfig(max_tokens_per_batch=40)))
    scorer = shared(folder, num_ranks, max_tokens_per_batch=40)
    for first in (0, 20):
        chunk = _chunk(make_trajectories(count, first=first))
        said, alone = scorer.score(chunk, EVERYTHING), whole.score(chunk, EVERYTHING)
        _assert_alike(said, alone, tolerance=0.0 if count == 1 else 1e-5)
    read = [each.read_logprobs(make_trajectories(7)) for each in (scorer, whole)]
    for ours, theirs in zip(*read, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert scorer.shipped() == whole.shipped(), "counted once, where it is handed on"
    held = [scorer.held(), *_of_others(scorer, "held")]
    total = sum(p.numel() for p in whole.model.parameters()) + whole.action_embeddings_VE.numel()
    assert sum(held) == total
    assert max(held) < 1.2 * total / num_ranks


def test_a_teacher_in_bfloat16_is_shared_in_bfloat16(
    shared: Scorers, tiny_model_folder: Any
) -> None:
    folder, chunk = tiny_model_folder(vocab_size=70), _chunk(make_trajectories(9))
    whole = TeacherScorer(**_arguments(folder, ScoringConfig(dtype="bfloat16")))
    scorer = shared(folder, 2, dtype="bfloat16")
    assert {p.dtype for p in scorer.model.parameters()} == {torch.bfloat16}
    said, alone = scorer.score(chunk, EVERYTHING), whole.score(chunk, EVERYTHING)
    assert said[0].features is not None
    assert said[0].features.dtype == np.float16
    for ours, theirs in zip(said, alone, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=0.05)


def test_what_is_not_finite_on_one_rank_is_refused_by_all_and_the_next_call_is_answered(
    shared: Scorers, tiny_model_folder: Any
) -> None:
    scorer = shared(tiny_model_folder(vocab_size=70, tie_word_embeddings=False), 2)
    good = [each for each in make_trajectories(12) if POISON not in each.token_ids]
    assert len(good) > 3
    before = scorer.score(_chunk(good), EVERYTHING)
    bad = make_trajectory(99, 3, 4)
    bad.token_ids[1] = POISON
    scorer.spoil(POISON)
    _of_others(scorer, "spoil", POISON)
    with pytest.raises(NonFiniteError, match="expected finite numbers"):
        scorer.score(_chunk([*good, bad]), EVERYTHING)
    _assert_alike(scorer.score(_chunk(good), EVERYTHING), before, tolerance=0.0)


def _of_others(scorer: RankedScorer, method: str, *arguments: Any) -> list[Any]:
    peers, others = scorer._peers, scorer.ranks.world_size - 1
    assert peers is not None
    calls = peers.call(method, [arguments] * others)
    return peers.finish(calls, what=method, seconds=60.0)


@pytest.mark.skipif(ALONE in os.environ, reason="this is that process")
def test_scorers_of_ranks_in_a_process_of_their_own() -> None:
    """torch remembers sizes of shares by group: what other tests have shared here would count."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=clean | {ALONE: "1"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
