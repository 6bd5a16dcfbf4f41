"""How finished trajectories are cut into chunks, by tokens, by number and by time."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_pools import Clock, SimulatedScorer, SimulatedWorkers

from distill_system.config.objective import MOMENTS, TeacherNeeds
from distill_system.observe import PoolClock
from distill_system.records import Author, Finish, Stream, Trajectory
from distill_system.scoring import AsynchronousScoring


def trajectory(number, num_tokens):
    return Trajectory(
        trajectory_id=f"t{number}",
        prompt_id=f"p{number}",
        author=Author.TEACHER,
        token_ids=np.ones(num_tokens, np.int32),
        num_prompt_tokens=1,
        behaviour_logprobs=np.zeros(num_tokens - 1, np.float32),
        temperature=1.0,
        finish=Finish.STOP,
    )


@pytest.fixture
def build():
    def make(*, num_scorers=1, needs=MOMENTS, max_tokens=100, max_sequences=50, max_wait=5.0):
        clock = Clock()
        workers = SimulatedWorkers(clock, [SimulatedScorer(rate=10.0) for _ in range(num_scorers)])
        scoring = AsynchronousScoring(
            workers,
            PoolClock(workers.members, 0.0),
            needs=dict.fromkeys(Stream, needs),
            max_tokens=max_tokens,
            max_sequences=dict.fromkeys(Stream, max_sequences),
            max_wait_seconds=max_wait,
        )
        return scoring, workers, clock

    return make


def fill(scoring, lengths, *, step=0, stream=Stream.OFF_POLICY, now=0.0):
    for number, length in enumerate(lengths):
        scoring.add(step, stream, trajectory(number, length), now=now)


def sizes(scoring, step=0, stream=Stream.OFF_POLICY):
    return [
        [int(t.token_ids.size) for t in part.chunk.trajectories]
        for part in scoring.take(step, stream)
    ]


def test_a_full_chunk_goes_at_once_and_the_rest_waits_its_time(build):
    scoring, _, _ = build()
    fill(scoring, [60, 30, 30])
    assert scoring.begin(now=0.0) == pytest.approx(5.0)
    assert scoring.num_waiting == 1
    assert scoring.begin(now=4.0) == pytest.approx(1.0)
    assert scoring.num_waiting == 1
    assert scoring.begin(now=5.0) is None
    assert sizes(scoring) == [[60, 30], [30]]


def test_what_a_full_chunk_leaves_has_waited_since_it_came(build):
    scoring, _, _ = build(max_tokens=60)
    fill(scoring, [50], now=0.0)
    fill(scoring, [50], now=3.0)
    assert scoring.begin(now=3.0) == pytest.approx(5.0)  # the first is full with the second
    assert scoring.begin(now=7.0) == pytest.approx(1.0)


def test_a_closed_batch_waits_for_nothing(build):
    scoring, _, _ = build()
    fill(scoring, [10, 10])
    scoring.close(0, Stream.OFF_POLICY)
    assert scoring.begin(now=0.0) is None
    assert sizes(scoring) == [[10, 10]]


def test_chunks_hold_so_few_that_every_rank_gets_one(build):
    scoring, _, _ = build(max_sequences=2, num_scorers=3)
    fill(scoring, [10, 10, 10, 10, 10])
    scoring.close(0, Stream.OFF_POLICY)
    scoring.begin(now=0.0)
    assert sizes(scoring) == [[10, 10], [10, 10], [10]]


def test_a_sequence_longer_than_the_budget_is_read_alone(build):
    scoring, _, _ = build(max_tokens=20, num_scorers=2)
    fill(scoring, [50, 5])
    scoring.close(0, Stream.OFF_POLICY)
    scoring.begin(now=0.0)
    assert sizes(scoring) == [[50], [5]]


def test_steps_and_streams_are_never_mixed_and_earlier_steps_go_first(build):
    scoring, workers, clock = build(num_scorers=1)
    fill(scoring, [90, 90, 90], step=4)
    fill(scoring, [90], step=3, stream=Stream.ON_POLICY)
    for step, stream in ((4, Stream.OFF_POLICY), (3, Stream.ON_POLICY)):
        scoring.close(step, stream)
    scoring.begin(now=0.0)  # two at the one scorer: one that runs and one behind it
    assert sizes(scoring, 3, Stream.ON_POLICY) == [[90]]
    assert scoring.num_waiting == 2
    first, second = scoring.references
    assert workers.wait_any([first, second], what="scores", seconds=100) == [first]
    scoring.collect(first, clock.now)
    scoring.begin(now=clock.now)
    assert scoring.num_waiting == 1
    assert not scoring.is_scored(4, Stream.OFF_POLICY)


def test_what_the_objective_does_not_ask_for_is_not_scored(build):
    scoring, _, _ = build(needs=TeacherNeeds())
    fill(scoring, [10])
    scoring.close(0, Stream.OFF_POLICY)
    scoring.begin(now=0.0)
    assert scoring.references == []
    assert scoring.is_scored(0, Stream.OFF_POLICY)
    assert [part.targets for part in scoring.take(0, Stream.OFF_POLICY)] == [None]


def test_a_scorer_that_leaves_finishes_what_it_has_and_gets_nothing_more(build):
    scoring, workers, clock = build(num_scorers=2)
    fill(scoring, [90, 90])
    scoring.close(0, Stream.OFF_POLICY)
    scoring.begin(now=0.0)
    assert not scoring.release(0, clock.now)
    done = workers.wait_any(scoring.references, what="scores", seconds=100)
    for reference in done:
        scoring.collect(reference, clock.now)
    assert scoring.release(0, clock.now)
    fill(scoring, [90, 90, 90], step=1)
    scoring.close(1, Stream.OFF_POLICY)
    scoring.begin(now=clock.now)
    assert len(scoring.references) == 2  # all at the scorer that stays
