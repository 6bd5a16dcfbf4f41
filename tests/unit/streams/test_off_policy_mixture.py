"""Who writes the off-policy stream, in which shares, and where each index leads."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from simulated_pools import make_prompts, make_rows
from trajectories import SAMPLE_ORIGIN, make_trajectories

from distill_system.config import load_config
from distill_system.data import (
    PromptFrontier,
    TrajectoryStore,
    read_trajectories,
    stored_rows,
)
from distill_system.records import Author, Prompt, Trajectory
from distill_system.run.sample_origin import PREFIX
from distill_system.streams.off_policy import OffPolicyMixture

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


@pytest.fixture
def build():
    data: Any = SimpleNamespace(
        prompts=make_prompts(7), stored=make_rows("store", 5), student_sft=make_rows("dataset", 3)
    )

    def make(source):
        overrides = [f"distill.off_policy_source={source}", "data.trajectory_store=store"]
        return OffPolicyMixture(load_config([QUICKSTART], overrides), data)

    return make


def _source(item):
    return "teacher" if isinstance(item, Prompt) else item.prompt_id.partition(":")[0]


def test_each_source_gives_its_share_at_every_moment(build):
    mixture = build("{teacher: 1, store: 2, dataset: 1}")
    given = Counter()
    for number in range(1, 81):
        [index] = mixture.frontier.take(1)
        given[_source(mixture.look_up(index))] += 1
        assert abs(given["store"] - number / 2) <= 1
        assert abs(given["teacher"] - number / 4) <= 1
    assert given == {"teacher": 20, "store": 40, "dataset": 20}


def test_an_epoch_holds_everything_of_a_source_once(build):
    mixture = build("store")
    epoch = [mixture.look_up(index).prompt_id for index in mixture.frontier.take(5)]
    assert sorted(epoch) == [f"store:{index}" for index in range(5)]


def test_the_teachers_share_is_parted_among_the_prompts_by_their_weights():
    """A quarter of the sequences is the teacher's, three in four of these from the source a."""
    rows = "source: {type: embedded, split: train, num_examples: 9, seed: 3}"
    sources = f"{{a: {{{rows}, weight: 6}}, b: {{{rows}, weight: 2}}}}"
    overrides = [
        f"data.prompts={{type: mixture, sources: {sources}}}",
        "distill.off_policy_source={teacher: 1, store: 3}",
        "data.trajectory_store=store",
    ]
    named = zip(["prompts.a"] * 5 + ["prompts.b"] * 4, make_prompts(9), strict=True)
    prompts = [replace(prompt, source=name) for name, prompt in named]
    data: Any = SimpleNamespace(prompts=prompts, stored=make_rows("store", 5), student_sft=())
    mixture = OffPolicyMixture(load_config([QUICKSTART], overrides), data)
    items = [mixture.look_up(index) for index in mixture.frontier.take(160)]
    asked = [item.source for item in items if isinstance(item, Prompt)]
    assert Counter(asked) == {"prompts.a": 30, "prompts.b": 10}


def test_a_stored_sample_goes_by_its_key_under_which_its_targets_may_stand(tmp_path):
    store = TrajectoryStore(tmp_path / "store", "t")
    store.append(
        stored_rows.make_rows(make_trajectories(4, Author.TEACHER), SAMPLE_ORIGIN, label="a")
    )
    stored = read_trajectories(tmp_path / "store", "t")
    data: Any = SimpleNamespace(prompts=make_prompts(3), stored=stored, student_sft=())
    overrides = ["distill.off_policy_source={teacher: 1, store: 1}", "data.trajectory_store=store"]
    mixture = OffPolicyMixture(load_config([QUICKSTART], overrides), data)
    for index in range(4):
        sample = mixture.look_up(3 + index)
        assert isinstance(sample, Trajectory)
        assert sample.trajectory_id == PREFIX + stored.key(index)
        assert sample.prompt_id == stored[index].prompt_id
        assert sample.token_ids.tolist() == stored[index].token_ids.tolist()


@pytest.mark.parametrize("source", ["teacher", "{teacher: 1, store: 1}"])
def test_an_index_behind_all_sets_is_a_mistake_of_ours(build, source):
    with pytest.raises(AssertionError, match="walks over these sets"):
        build(source).look_up(7 + (5 if "store" in source else 0))


@pytest.mark.parametrize(
    ("source", "count", "purpose"),
    [("teacher", 7, "teacher_prompts"), ("dataset", 3, "dataset_rows")],
)
def test_a_source_alone_walks_as_it_always_did(build, source, count, purpose):
    mixture = build(source)
    assert mixture.frontier.take(20) == PromptFrontier(count, 0, purpose).take(20)
