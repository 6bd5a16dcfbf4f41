"""What ranks do together: sums and maxima over all of them, and leaving."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from process_groups import run_ranks

from distill_system.learner.ranks import Ranks


def _ranks(rank, world_size, *, alone=False):
    return Ranks(
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        timeout_seconds=60.0,
        alone=alone,
    )


def _together(rank):
    ranks = _ranks(rank, 2)
    own = torch.tensor([1.0, 10.0]) * (rank + 1)
    total = ranks.sum(own)
    scalars = ranks.sum_scalars(
        {"b": torch.tensor([2.0 + rank]), "a": torch.tensor(rank), "c": torch.tensor(2**24 + rank)}
    )
    largest = (ranks.max(3 + rank), ranks.max(0.5 - rank))
    nothing = ranks.sum_scalars({})
    _ranks(rank, 1, alone=True).close()
    still_there = dist.is_initialized()
    ranks.close()
    return total.tolist(), own.tolist(), scalars, largest, nothing, still_there


def test_two_ranks_speak_with_one_voice(tmp_path):
    answers = run_ranks(2, tmp_path / "meeting", _together)
    for rank, (total, own, scalars, largest, nothing, still_there) in answers.items():
        assert total == [3.0, 30.0]
        assert own == [1.0 + rank, 10.0 + 10.0 * rank], "the argument stays"
        # Float32 would lose the last bit of the third.
        assert list(scalars.items()) == [("b", 5.0), ("a", 1.0), ("c", 2.0**25 + 1)]
        assert largest == (4, 0.5)
        assert [type(value) for value in largest] == [int, float]
        assert nothing == {}
        assert still_there, "a rank that is alone leaves the group of others as it is"


def _is_gone(rank):
    ranks = _ranks(rank, 2)
    ranks.close()
    gone = not dist.is_initialized()
    ranks.close()
    return gone


def test_a_rank_that_has_left_may_leave_again(tmp_path):
    assert run_ranks(2, tmp_path / "meeting", _is_gone) == {0: True, 1: True}


@pytest.mark.parametrize("value", [3, 0.1])
def test_one_rank_is_its_own_sum_and_maximum(value):
    ranks = _ranks(0, 1, alone=True)
    ranks.connect("nowhere", 1)  # there is nobody to meet
    assert not dist.is_initialized()
    assert ranks.sum(torch.tensor(value)) == torch.tensor(value)
    assert ranks.max(value) == value
    assert ranks.sum_scalars({"a": torch.tensor(value)}) == {"a": pytest.approx(value)}
