from __future__ import annotations

import itertools
import json
import pickle
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from trajectories import make_trajectories, make_trajectory

from distill_system import errors
from distill_system.config.objective.needs import SIGNALS, TeacherNeeds
from distill_system.errors import DistillError, RecordError
from distill_system.objectives import TeacherRows
from distill_system.records import (
    Author,
    PoolActivity,
    Prompt,
    Stream,
    TeacherTargets,
    TrajectoryChunk,
    VersionSpan,
    count_occurrences,
    deal_by_cost,
    trajectory_from_plain,
    trajectory_to_plain,
)


def test_a_trajectory_knows_its_response_and_its_oldest_version():
    trajectory = make_trajectory(1, num_prompt=4, num_response=5)
    spans = (VersionSpan(version=7, start=0, end=2), VersionSpan(version=8, start=2, end=5))
    trajectory = replace(trajectory, weight_versions=spans)
    assert trajectory.num_response_tokens == 5
    assert trajectory.response_ids.tolist() == trajectory.token_ids[4:].tolist()
    assert trajectory.oldest_version == 7
    assert make_trajectory(1, 4, 5, Author.TEACHER).oldest_version is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"behaviour_logprobs": np.zeros(3, np.float32)}, "behaviour_logprobs [5]"),
        ({"token_ids": np.zeros(9, np.int64)}, "int32"),
        ({"num_prompt_tokens": 0}, "num_prompt_tokens >= 1"),
        ({"num_prompt_tokens": 9}, "at least one response token"),
        ({"weight_versions": (VersionSpan(version=1, start=0, end=4),)}, "covering [0, 5)"),
        (
            {
                "weight_versions": (
                    VersionSpan(version=1, start=0, end=2),
                    VersionSpan(version=2, start=3, end=5),
                )
            },
            "covering [0, 5)",
        ),
    ],
)
def test_a_trajectory_whose_arrays_disagree_is_refused_by_its_id(change, said):
    trajectory = make_trajectory(1, num_prompt=4, num_response=5)
    with pytest.raises(RecordError) as caught:
        replace(trajectory, **change)
    assert said in str(caught.value)
    assert "'t1'" in str(caught.value)


def test_a_dataset_trajectory_has_no_behaviour_logprobs():
    assert make_trajectory(0, 3, 4, Author.DATASET).behaviour_logprobs.shape == (0,)
    with pytest.raises(RecordError, match=r"behaviour_logprobs \[0\]"):
        replace(make_trajectory(0, 3, 4), author=Author.DATASET)


def test_a_prompt_must_hold_tokens():
    with pytest.raises(RecordError, match="P >= 1"):
        Prompt(prompt_id="p", token_ids=np.zeros(0, np.int32), text="")


def test_teacher_targets_of_unequal_length_are_refused():
    with pytest.raises(RecordError, match=r"expected_embedding \[3, E\], got \[2, 2\]"):
        TeacherTargets(
            trajectory_id="t",
            num_tokens=3,
            features=np.zeros((3, 2), np.float16),
            expected_embedding=np.zeros((2, 2), np.float16),
            logprobs=np.zeros(3, np.float32),
        )


def test_teacher_targets_of_another_dtype_are_refused():
    with pytest.raises(RecordError, match=r"features of float16 or float32, got float64"):
        TeacherTargets(trajectory_id="t", num_tokens=3, features=np.zeros((3, 2)))
    with pytest.raises(RecordError, match=r"top_k_ids of int32, got int64"):
        TeacherTargets(trajectory_id="t", num_tokens=3, top_k_ids=np.zeros((3, 2), np.int64))


def test_records_and_rows_hold_the_signals_of_the_table_and_no_others():
    signals = {signal.name for signal in SIGNALS}
    identity = {"trajectory_id", "num_tokens"}
    assert {field.name for field in fields(TeacherTargets)} == signals | identity
    rows = {f"{signal.name}_N{signal.axis}" for signal in SIGNALS}
    assert {field.name for field in fields(TeacherRows)} == rows
    assert {signal.need for signal in SIGNALS} == set(TeacherNeeds.model_fields)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_dealing_keeps_every_trajectory_and_balances_tokens(count):
    trajectories = make_trajectories(23)
    chunks = TrajectoryChunk.deal(trajectories, Stream.ON_POLICY, count)
    dealt = [t.trajectory_id for chunk in chunks for t in chunk.trajectories]
    assert sorted(dealt) == sorted(t.trajectory_id for t in trajectories)
    assert len(chunks) == min(count, len(trajectories))
    sizes = [chunk.num_tokens for chunk in chunks]
    longest = max(t.token_ids.size for t in trajectories)
    assert max(sizes) - min(sizes) <= longest
    assert sum(chunk.num_response_tokens for chunk in chunks) == sum(
        t.num_response_tokens for t in trajectories
    )


def test_ragged_trajectories_are_dealt_evenly():
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(5.0, 0.8, size=256).astype(int) + 1
    trajectories = [make_trajectory(index, 1, int(n)) for index, n in enumerate(lengths)]
    sizes = [c.num_tokens for c in TrajectoryChunk.deal(trajectories, Stream.ON_POLICY, 8)]
    assert max(sizes) < 1.01 * sum(sizes) / 8


def test_no_hand_costs_more_than_four_thirds_of_the_best_deal():
    generator = np.random.default_rng(0)
    for _ in range(40):
        costs = generator.lognormal(3.0, 1.0, size=7).astype(int).tolist()
        best = min(
            np.bincount(seats, weights=costs).max()
            for seats in itertools.product(range(3), repeat=7)
        )
        dealt = deal_by_cost(costs, 3)
        assert sorted(index for hand in dealt for index in hand) == list(range(7))
        assert best <= max(sum(costs[i] for i in hand) for hand in dealt) <= best * 4 / 3


def test_every_error_survives_pickling_and_is_drawn_in_the_tree():
    kinds = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, DistillError)
    ]
    assert len(kinds) > 5
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("what came")))
        assert type(copy) is kind
        assert str(copy) == "what came"
        assert kind.__name__ in (errors.__doc__ or "")


def test_a_trajectory_survives_json_to_the_bit():
    first, *others = make_trajectories(5)
    kept = np.stack([first.response_ids, np.full_like(first.response_ids, -1)], axis=1)
    more = replace(first, kept_ids=kept, teacher_prompt_ids=first.token_ids[:2])
    for trajectory in (more, *others):
        again = trajectory_from_plain(json.loads(json.dumps(trajectory_to_plain(trajectory))))
        for name in ("token_ids", "behaviour_logprobs", "kept_ids", "teacher_prompt_ids"):
            ours, theirs = getattr(again, name), getattr(trajectory, name)
            assert getattr(ours, "dtype", None) == getattr(theirs, "dtype", None)
            np.testing.assert_array_equal(ours, theirs)
        ids, logprobs = trajectory.token_ids, again.behaviour_logprobs
        assert repr(replace(again, token_ids=ids, behaviour_logprobs=logprobs)) == repr(
            replace(trajectory, token_ids=ids, behaviour_logprobs=logprobs)
        )


def test_shares_of_a_pool_are_of_all_its_workers_time():
    pool = PoolActivity(
        num_workers=2.5, seconds=4.0, busy_seconds=5.0, starved_seconds=2.0, blocked_seconds=1.0
    )
    assert pool.worker_seconds == 10.0
    assert (pool.busy_share, pool.starved_share, pool.blocked_share) == (0.5, 0.2, 0.1)
    assert PoolActivity(num_workers=3, seconds=0.0).busy_share == 0.0


def test_a_pool_that_claims_more_time_than_its_workers_had_is_refused():
    thirds: dict[str, Any] = dict.fromkeys(
        ("busy_seconds", "starved_seconds", "blocked_seconds"), 0.1 + 0.2
    )
    PoolActivity(num_workers=3, seconds=0.3, **thirds)  # 0.1 + 0.2 > 0.3 is rounding
    with pytest.raises(RecordError, match=r"at most 2\.0 worker-seconds, got 2\.1"):
        PoolActivity(num_workers=2, seconds=1.0, busy_seconds=1.0, starved_seconds=1.1)
    with pytest.raises(RecordError, match="blocked_seconds >= 0"):
        PoolActivity(num_workers=2, seconds=1.0, blocked_seconds=-0.1)
    with pytest.raises(RecordError, match="queued >= 0"):
        PoolActivity(num_workers=2, seconds=1.0, queued=-1)


def test_prompts_that_stand_together_again_are_counted_whole_or_in_parts():
    ids = ["a", "b", "a", "a", "b"]
    prompts = [Prompt(prompt_id=i, token_ids=np.ones(1, np.int32), text="") for i in ids]
    counted = count_occurrences(prompts)
    assert [prompt.sample_id for prompt in counted] == ["a", "b", "a#2", "a#3", "b#2"]
    assert counted[0] is prompts[0]
    assert count_occurrences(counted) == counted
    for part in (counted[::2], counted[1::2], counted[3:]):
        assert count_occurrences(part) == part
