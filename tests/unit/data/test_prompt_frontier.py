import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_system.data import PromptFrontier, SourceShare, source_shares
from distill_system.errors import DataError, RunStateError
from distill_system.records import Prompt

sizes = st.integers(min_value=1, max_value=40)
counts = st.lists(st.integers(min_value=0, max_value=100), max_size=12)
weights = st.floats(min_value=1e-3, max_value=1e3)
mixtures = st.lists(st.tuples(sizes, weights), min_size=2, max_size=6)


def _mixture(sources):
    return [SourceShare(f"s{at}", size, weight) for at, (size, weight) in enumerate(sources)]


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


@given(num_prompts=sizes, num_epochs=st.integers(1, 4), batch=st.integers(1, 50))
def test_every_epoch_is_a_permutation(num_prompts, num_epochs, batch):
    frontier = PromptFrontier(num_prompts, 7, "student")
    walked = []
    while len(walked) < num_prompts * num_epochs:
        walked += frontier.take(batch)
    for epoch in range(num_epochs):
        part = walked[epoch * num_prompts : (epoch + 1) * num_prompts]
        assert sorted(part) == list(range(num_prompts))


@settings(max_examples=25)
@given(sources=mixtures, count=st.integers(1, 300))
def test_no_source_is_ever_further_from_its_share_than_tijdemans_bound(sources, count):
    """1 - 1 / (2n - 2) of n sources: half a prompt of two, less than a whole one of any number."""
    bound = 1 - 1 / (2 * len(sources) - 2)
    frontier = PromptFrontier(_mixture(sources), 0, "student")
    edges = np.cumsum([size for size, _ in sources])
    total = sum(weight for _, weight in sources)
    taken = np.zeros(len(sources))
    for turn in range(1, count + 1):
        taken[np.searchsorted(edges, frontier.take(1)[0], side="right")] += 1
        shares = np.array([turn * weight / total for _, weight in sources])
        assert np.abs(taken - shares).max() <= bound + 1e-9


def test_whole_weights_come_out_exactly_in_every_round():
    shares = [SourceShare("a", 7, 3.0), SourceShare("b", 5, 2.0), SourceShare("c", 100, 1.0)]
    walked = PromptFrontier(shares, 3, "student").take(6 * 50)
    for start in range(0, len(walked), 6):
        names = Counter("a" if i < 7 else "b" if i < 12 else "c" for i in walked[start : start + 6])
        assert names == {"a": 3, "b": 2, "c": 1}


@settings(max_examples=25)
@given(sources=mixtures, takes=counts)
def test_each_source_walks_epochs_of_its_own_whatever_is_restored(sources, takes):
    shares = _mixture(sources)
    frontier = PromptFrontier(shares, 1, "student")
    walked = []
    for count in takes:
        walked += frontier.take(count)
        saved = json.loads(json.dumps(frontier.state()))
        frontier = PromptFrontier(shares, 1, "student")
        frontier.restore(saved)
    assert walked == PromptFrontier(shares, 1, "student").take(sum(takes))
    for first, (size, _) in zip(np.cumsum([0, *(s for s, _ in sources)]), sources, strict=False):
        own = [index - first for index in walked if first <= index < first + size]
        for start in range(0, len(own), size):
            epoch = own[start : start + size]
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) < size or sorted(epoch) == list(range(size))


def test_a_source_without_a_weight_counts_as_one_of_weight_one():
    shares = [SourceShare("a", 5), SourceShare("b", 5, 1.0), SourceShare("c", 5, 2.0)]
    taken = PromptFrontier(shares, 0, "student").take(40)
    assert Counter(index // 5 for index in taken) == {0: 10, 1: 10, 2: 20}


def test_sources_have_orders_of_their_own():
    walked = PromptFrontier([SourceShare("a", 50), SourceShare("b", 50)], 0, "student").take(100)
    first = [index for index in walked if index < 50]
    second = [index - 50 for index in walked if index >= 50]
    assert len(first) == len(second) == 50
    assert first != second


@given(
    num_prompts=st.integers(5, 30),
    batches=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=15),
)
def test_what_was_under_way_comes_again_before_anything_new_and_nothing_is_lost_or_doubled(
    num_prompts, batches
):
    """Over any resumes the trained prompts are the walk's first ones, each as often as drawn."""
    frontier = PromptFrontier(num_prompts, 2, "student")
    trained, waiting, drawn = [], [], 0
    for count, num_lost in batches:
        taken = frontier.take(count)
        assert taken[: len(waiting)] == waiting[: len(taken)]
        drawn += max(0, count - len(waiting))
        waiting = waiting[len(taken) :]
        lost = taken[:num_lost]
        trained += taken[num_lost:]
        saved = json.loads(json.dumps(frontier.state(under_way=lost)))
        frontier = PromptFrontier(num_prompts, 2, "student")
        frontier.restore(saved)
        waiting = lost + waiting
    walk = PromptFrontier(num_prompts, 2, "student").take(drawn)
    assert Counter(trained) + Counter(waiting) == Counter(walk)


def test_epochs_seeds_and_purposes_have_orders_of_their_own():
    first = PromptFrontier(100, 0, "student").take(200)
    assert first[:100] != first[100:]
    assert PromptFrontier(100, 1, "student").take(100) != first[:100]
    assert PromptFrontier(100, 0, "teacher").take(100) != first[:100]
    assert all(type(index) is int for index in first)


def test_a_single_source_walks_as_it_did_before_there_were_several():
    """Pinned, so that runs of old seeds stay what they were."""
    assert PromptFrontier(10, 0, "student_prompts").take(10) == [1, 0, 3, 6, 2, 8, 5, 4, 7, 9]
    one = PromptFrontier([SourceShare("prompts", 10, 5.0)], 0, "student_prompts")
    assert one.take(10) == [1, 0, 3, 6, 2, 8, 5, 4, 7, 9]


def test_the_shares_of_prompts_follow_their_sources():
    ids = np.ones(2, dtype=np.int32)
    prompts = [
        Prompt(prompt_id=f"{name}:{at}", token_ids=ids, text="", source=name)
        for name, count in (("prompts.a", 3), ("prompts.b", 2))
        for at in range(count)
    ]
    shares = source_shares(prompts, {"prompts.b": 2.5})
    assert shares == [("prompts.a", 3, 1.0), ("prompts.b", 2, 2.5)]
    walked = PromptFrontier(shares, 0, "student").take(700)
    assert sum(index >= 3 for index in walked) == 500


def test_state_of_another_data_set_is_refused():
    frontier = PromptFrontier(10, 0, "student")
    with pytest.raises(RunStateError, match=r"walks over 11 prompts.*now holds 10"):
        frontier.restore(PromptFrontier(11, 0, "student").state())
    two = PromptFrontier([SourceShare("a", 4), SourceShare("b", 6)], 0, "student")
    with pytest.raises(RunStateError, match=r"walks over 4 of a, 6 of b prompts.*now holds 10"):
        frontier.restore(two.state())


def test_no_prompts_is_refused():
    with pytest.raises(DataError, match="at least one prompt"):
        PromptFrontier(0, 0, "student")
    with pytest.raises(DataError, match=r"at least one prompt to draw, got \[3, 0\]"):
        PromptFrontier([SourceShare("a", 3), SourceShare("b", 0)], 0, "student")
    with pytest.raises(DataError, match="at least one prompt"):
        PromptFrontier([], 0, "student")
