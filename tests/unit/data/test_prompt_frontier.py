import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_system.data import PromptFrontier
from distill_system.errors import DataError, RunStateError

sizes = st.integers(min_value=1, max_value=40)
counts = st.lists(st.integers(min_value=0, max_value=100), max_size=12)


@settings(deadline=None)  # a busy machine is not a failure
@given(num_prompts=sizes, seed=st.integers(0, 10**6), takes=counts)
def test_takes_with_restores_in_between_equal_one_unbroken_walk(num_prompts, seed, takes):
    unbroken = PromptFrontier(num_prompts, seed, "student").take(sum(takes))
    frontier = PromptFrontier(num_prompts, seed, "student")
    walked = []
    for count in takes:
        walked += frontier.take(count)
        saved = json.loads(json.dumps(frontier.state()))
        frontier = PromptFrontier(num_prompts, seed, "student")
        frontier.restore(saved)
    assert walked == unbroken


@settings(deadline=None)
@given(num_prompts=sizes, num_epochs=st.integers(1, 4), batch=st.integers(1, 50))
def test_every_epoch_is_a_permutation(num_prompts, num_epochs, batch):
    frontier = PromptFrontier(num_prompts, 7, "student")
    walked = []
    while len(walked) < num_prompts * num_epochs:
        walked += frontier.take(batch)
    for epoch in range(num_epochs):
        part = walked[epoch * num_prompts : (epoch + 1) * num_prompts]
        assert sorted(part) == list(range(num_prompts))


def test_epochs_seeds_and_purposes_have_orders_of_their_own():
    first = PromptFrontier(100, 0, "student").take(200)
    assert first[:100] != first[100:]
    assert PromptFrontier(100, 1, "student").take(100) != first[:100]
    assert PromptFrontier(100, 0, "teacher").take(100) != first[:100]
    assert all(type(index) is int for index in first)


def test_state_of_another_data_set_is_refused():
    frontier = PromptFrontier(10, 0, "student")
    with pytest.raises(RunStateError, match=r"walks over 11 prompts.*now holds 10"):
        frontier.restore(PromptFrontier(11, 0, "student").state())


def test_no_prompts_is_refused():
    with pytest.raises(DataError, match="at least one prompt"):
        PromptFrontier(0, 0, "student")
