"""How finished trajectories are cut into chunks, by tokens, by number and by time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from simulated_pools import Clock, SimulatedScorer, SimulatedWorkers

from distill_system.config.objective import MOMENTS, TeacherNeeds
from distill_system.records import Author, Finish, Stream, Trajectory
from distill_system.streams.in_flight import InFlight
from distill_system.streams.scorers import Scorers
from distill_system.streams.watched_workers import WatchedWorkers
from distill_system.streams.window import StalenessWindow

BATCH = 50


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


class Built:
    """Scorers over simulated workers of ten tokens a second, with a buffer for each stream.

    The windows hold two batches, of which texts fill the first or the second as `fill` is asked.
    """

    def __init__(
        self, *, num_scorers=1, needs=MOMENTS, max_tokens=100, max_sequences=50, max_wait=5.0
    ):
        self.clock = Clock()
        scorers = [SimulatedScorer(rate=10.0) for _ in range(num_scorers)]
        self.workers = SimulatedWorkers(self.clock, scorers)
        window = StalenessWindow(
            batch_size=BATCH, max_staleness=1, first_step=0, end_step=9, min_share=1 / BATCH
        )
        self.buffers = {stream: InFlight(window, ages=False) for stream in Stream}
        self._entries = {
            stream: [buffer.give(0, itertools.count().__next__) for _ in range(2 * BATCH)]
            for stream, buffer in self.buffers.items()
        }
        self.scorers = Scorers(
            WatchedWorkers(self.workers, self.clock),
            self.buffers,
            needs=dict.fromkeys(Stream, needs),
            max_tokens=max_tokens,
            max_sequences=dict.fromkeys(Stream, max_sequences),
            max_wait_seconds=max_wait,
            clock=self.clock,
        )

    def fill(self, lengths, *, step=0, stream=Stream.OFF_POLICY):
        for length in lengths:
            entry = next(e for e in self._entries[stream] if e.step == step and not e.trajectory)
            text = trajectory(entry.number, length)
            self.buffers[stream].arrive(entry, text, self.clock.now)

    def begin(self, at):
        self.clock.now = at
        return self.scorers.begin()

    def chunks(self, step=0, stream=Stream.OFF_POLICY):
        """Lengths of the texts in each chunk that was handed out for a step."""
        found = {
            id(entry.chunk): entry.chunk
            for entry in self._entries[stream]
            if entry.step == step and entry.chunk is not None
        }
        return [[int(t.token_ids.size) for t in part.chunk.trajectories] for part in found.values()]


def test_a_full_chunk_goes_at_once_and_the_rest_waits_its_time():
    built = Built()
    built.fill([60, 30, 30])
    assert built.begin(at=0.0) == pytest.approx(5.0)
    assert built.scorers.num_waiting == 1
    assert built.begin(at=4.0) == pytest.approx(1.0)
    assert built.scorers.num_waiting == 1
    assert built.begin(at=5.0) is None
    assert built.chunks() == [[60, 30], [30]]


def test_what_a_full_chunk_leaves_has_waited_since_it_came():
    built = Built(max_tokens=60)
    built.fill([50])
    built.clock.now = 3.0
    built.fill([50])
    assert built.begin(at=3.0) == pytest.approx(5.0)  # the first is full with the second
    assert built.begin(at=7.0) == pytest.approx(1.0)


def test_a_step_that_is_asked_for_waits_for_nothing():
    built = Built()
    built.fill([10, 10])
    built.buffers[Stream.OFF_POLICY].demand()
    assert built.begin(at=0.0) is None
    assert built.chunks() == [[10, 10]]


def test_chunks_hold_so_few_that_every_rank_gets_one():
    built = Built(max_sequences=2, num_scorers=3)
    built.fill([10, 10, 10, 10, 10])
    built.buffers[Stream.OFF_POLICY].demand()
    built.begin(at=0.0)
    assert built.chunks() == [[10, 10], [10, 10], [10]]


def test_a_sequence_longer_than_the_budget_is_read_alone():
    built = Built(max_tokens=20, num_scorers=2)
    built.fill([50, 5])
    built.buffers[Stream.OFF_POLICY].demand()
    built.begin(at=0.0)
    assert built.chunks() == [[50], [5]]


def test_steps_and_streams_are_never_mixed_and_earlier_steps_go_first():
    built = Built(num_scorers=1, max_sequences=1)
    built.fill([90, 90, 90], step=1)
    built.fill([80], step=0, stream=Stream.ON_POLICY)
    built.begin(at=0.0)  # two at the one scorer: one that runs and one behind it
    assert built.chunks(0, Stream.ON_POLICY) == [[80]]
    assert built.chunks(1) == [[90]]
    assert built.scorers.num_waiting == 2
    first, second = built.scorers.references
    assert built.workers.wait_any([first, second], what="scores", seconds=100) == [first]
    assert not built.buffers[Stream.ON_POLICY].is_scored()
    built.scorers.collect([first])
    assert built.buffers[Stream.ON_POLICY].is_scored()
    built.scorers.begin()
    assert built.scorers.num_waiting == 1


def test_what_the_objective_does_not_ask_for_is_not_scored():
    built = Built(needs=TeacherNeeds())
    built.fill([10])
    buffer = built.buffers[Stream.OFF_POLICY]
    buffer.demand()
    built.begin(at=0.0)
    assert built.scorers.references == []
    assert buffer.is_scored()
    assert built.chunks() == [[10]]


def test_a_scorer_that_leaves_finishes_what_it_has_and_gets_nothing_more():
    built = Built(num_scorers=2, max_sequences=1)
    built.fill([90, 90])
    built.begin(at=0.0)
    assert not built.scorers.leave(0)
    done = built.workers.wait_any(built.scorers.references, what="scores", seconds=100)
    assert built.scorers.workers.present == {0, 1}, "it works still"
    for reference in done:
        built.scorers.collect([reference])
    assert built.scorers.workers.present == {1}
    assert built.scorers.leave(0)
    built.fill([90, 90, 90])
    built.scorers.begin()
    assert len(built.scorers.references) == 2  # all at the scorer that stays
    assert built.scorers.members == {1}


def test_a_scorer_that_left_idle_is_counted_no_longer():
    built = Built(num_scorers=2)
    assert built.scorers.leave(0)
    built.clock.now = 10.0
    assert built.scorers.workers.pop_activity().worker_seconds == pytest.approx(10.0)
