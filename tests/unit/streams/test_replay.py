"""DistiLLM's schedule: which text a step learns from, and that a resumed run chooses the same."""

from __future__ import annotations

import json

import pytest
from trajectories import make_trajectories

from distill_system.config.distill import ReplayConfig
from distill_system.streams.replay import AdaptiveReplay, StepKind

STEPS = 400


def _replay(**config):
    return AdaptiveReplay(ReplayConfig(**config), seed=3, total_steps=STEPS)


def _kinds(replay):
    return [replay.choose(step) for step in range(STEPS)]


def test_without_a_share_every_step_reads_data():
    assert set(_kinds(_replay())) == {StepKind.DATA}


def test_until_the_buffer_is_full_no_text_is_used_again():
    kinds = _kinds(_replay(initial_share=0.5, capacity=10))
    assert StepKind.REPLAY not in kinds
    assert kinds.count(StepKind.WRITE) == pytest.approx(0.5 * STEPS, rel=0.2)


def test_with_a_full_buffer_the_student_writes_less_and_less():
    replay = _replay(initial_share=1.0, capacity=5)
    replay.keep(make_trajectories(8))
    kinds = _kinds(replay)
    assert StepKind.DATA not in kinds
    written = [kinds[at : at + STEPS // 4].count(StepKind.WRITE) for at in range(0, STEPS, 100)]
    # Expected shares 1 - t/T over the quarters: 7/8, 5/8, 3/8, 1/8 of a hundred steps.
    assert written == pytest.approx([87.5, 62.5, 37.5, 12.5], abs=15)


def test_only_a_rise_of_the_loss_raises_the_share():
    replay = _replay(increase=0.3, tolerance=0.1)
    shares = []
    for loss in (2.0, 1.5, 1.55, 1.7, 1.9, 1.0, 1.2, 1.4, 1.6):
        replay.on_held_out_loss(loss)
        shares.append(round(replay.share, 6))
    assert shares == [0, 0, 0, 0.3, 0.6, 0.6, 0.9, 1.0, 1.0]


def test_a_rise_by_the_tolerance_itself_counts_as_none():
    replay = _replay(increase=0.3, tolerance=0.5)
    for loss in (1.0, 1.5, 2.0):
        replay.on_held_out_loss(loss)
    assert replay.share == 0
    replay.on_held_out_loss(2.5625)
    assert replay.share == 0.3


def test_a_schedule_of_a_seed_stays_what_it_was():
    """Pinned, so that a run that is resumed under a later version goes on as it began."""
    replay = _replay(initial_share=0.6, capacity=5)
    replay.keep(make_trajectories(5))
    kinds = "".join(replay.choose(step).name[0] for step in range(200, 210))
    assert kinds == "WDWRWRDDDW"  # data, write, replay
    assert [t.trajectory_id for t in replay.sample(2, 3)] == ["t0", "t2", "t4"]


def test_the_oldest_text_leaves_first_and_a_sample_repeats_nothing():
    replay = _replay(capacity=6)
    written = make_trajectories(10)
    replay.keep(written)
    assert [t.trajectory_id for t in replay.buffer] == [t.trajectory_id for t in written[4:]]
    sample = replay.sample(0, 4)
    assert len({t.trajectory_id for t in sample}) == 4
    everything = {t.trajectory_id for t in replay.sample(1, 100)}
    assert everything == {t.trajectory_id for t in written[4:]}


def test_a_resumed_schedule_goes_on_as_if_it_had_not_been_ended():
    replay = _replay(initial_share=0.6, capacity=5)
    replay.keep(make_trajectories(9))
    replay.on_held_out_loss(1.0)
    resumed = _replay(initial_share=0.6, capacity=5)
    resumed.restore(json.loads(json.dumps(replay.state())))
    for one in (replay, resumed):
        one.on_held_out_loss(2.0)
    assert _kinds(resumed) == _kinds(replay)
    for step in range(5):
        ours = [trajectory.token_ids.tolist() for trajectory in resumed.sample(step, 3)]
        assert ours == [trajectory.token_ids.tolist() for trajectory in replay.sample(step, 3)]
