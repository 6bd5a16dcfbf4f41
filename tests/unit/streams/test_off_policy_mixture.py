"""Who writes the off-policy stream, in which shares, and where each index leads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from simulated_pools import make_prompts, make_rows

from distill_system.config import load_config
from distill_system.data import PromptFrontier
from distill_system.records import Prompt
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


@pytest.mark.parametrize(
    ("source", "count", "purpose"),
    [("teacher", 7, "teacher_prompts"), ("dataset", 3, "dataset_rows")],
)
def test_a_source_alone_walks_as_it_always_did(build, source, count, purpose):
    mixture = build(source)
    assert mixture.frontier.take(20) == PromptFrontier(count, 0, purpose).take(20)
