"""Random states of the CPU and of a CUDA device, which a stand-in plays here."""

from __future__ import annotations

import pytest
import torch

from distill_system.learner.random_state import random_state, restore_random_state


@pytest.fixture
def device(monkeypatch):
    """A CUDA device whose generator is one number; call it with whether there is one."""
    held = {"state": torch.tensor([7], dtype=torch.uint8)}

    def make(is_there):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: held["state"].clone())
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s: held.update(state=s))
        return held

    yield make
    torch.manual_seed(0)


@pytest.mark.parametrize("was_there", [True, False])
@pytest.mark.parametrize("is_there", [True, False])
def test_generators_go_on_where_they_were_as_far_as_there_are_any(device, was_there, is_there):
    held = device(was_there)
    torch.manual_seed(3)
    states = random_state()
    assert states.keys() == ({"cpu", "cuda"} if was_there else {"cpu"})
    expected = torch.rand(3)
    held["state"] = torch.tensor([9], dtype=torch.uint8)
    device(is_there)
    torch.manual_seed(4)
    restore_random_state(states, new_rank=None)
    assert torch.equal(torch.rand(3), expected)
    assert int(held["state"]) == (7 if was_there and is_there else 9)


def test_a_new_rank_goes_on_from_the_other_ranks_state(device):
    """Its numbers follow from that state and its number alone, and are not the other's."""
    device(False)
    drawn = []
    for seed, rank in ((3, 1), (3, 1), (3, 2), (4, 1)):
        torch.manual_seed(seed)
        states = random_state()
        own = torch.rand(3)
        restore_random_state(states, new_rank=rank)
        drawn.append(torch.rand(3).tolist())
        assert drawn[-1] != own.tolist()
    assert drawn[0] == drawn[1]
    assert len({tuple(each) for each in drawn}) == 3
