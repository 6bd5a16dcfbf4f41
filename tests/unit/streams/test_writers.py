"""Which rollout worker is given a prompt, and what it is told."""

from __future__ import annotations

import itertools

from simulated_pools import Clock, SimulatedWorkers, SimulatedWriter, make_prompts

from distill_system.records import Author
from distill_system.rollout import GenerationRequest, Sampling
from distill_system.streams.in_flight import InFlight
from distill_system.streams.watched_workers import WatchedWorkers
from distill_system.streams.window import StalenessWindow
from distill_system.streams.writers import NO_VERSION, Writers

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=4)
PROMPTS = make_prompts(100)


class Built:
    """Writers of a window that always has room, over simulated workers of one token a second."""

    def __init__(self, count, *, version=0, rate=1.0):
        self.clock = Clock()
        writers = [SimulatedWriter(Author.STUDENT, rate, lambda: 3) for _ in range(count)]
        self.workers = SimulatedWorkers(self.clock, writers)
        window = StalenessWindow(batch_size=100, max_staleness=9, first_step=0, end_step=99)
        self.buffer = InFlight(window, ages=True)
        self.writers = Writers(
            WatchedWorkers(self.workers, self.clock),
            self.buffer,
            slice_seconds=1.0,
            version=version,
            clock=self.clock,
        )
        self._numbers = itertools.count()

    def give(self, most, needed=0):
        """Give prompts out until none may be given; returns the workers that got one, in order."""
        given = []
        while len(given) < most:
            found = self.writers.find_free(lambda version: version >= needed)
            if found is None:
                break
            entry = self.buffer.give(9, self._numbers.__next__)
            entry.request = GenerationRequest(
                prompt=PROMPTS[entry.prompt], label="ticket", sampling=SAMPLING, seed=0
            )
            entry.name = entry.request.name(Author.STUDENT)
            self.writers.write(found[0], entry)
            given.append(found[0])
        return given

    def wait(self):
        """Let time go by until a slice has ended; its references."""
        return self.workers.wait_any(self.writers.references, what="slices", seconds=99)


def test_the_first_worker_with_new_weights_does_not_get_what_is_meant_for_all():
    built = Built(4)
    assert sorted(built.give(8)) == [0, 0, 1, 1, 2, 2, 3, 3]
    built.writers.hold(2, 1)
    first = built.give(32, needed=1)
    assert first == [2]  # one more than the others, no more
    for worker in (0, 1, 3):
        built.writers.hold(worker, 1)
    rest = built.give(32 - len(first), needed=1)
    assert {worker: (first + rest).count(worker) for worker in range(4)} == dict.fromkeys(
        range(4), 8
    )


def test_a_worker_that_joined_without_weights_holds_nobody_back():
    built = Built(1)
    built.writers.join(1, version=NO_VERSION)
    assert built.give(5) == [0] * 5


def test_a_worker_that_writes_has_two_slices_in_flight_and_an_idle_one_none():
    built = Built(2)
    assert built.give(1) == [0]
    built.writers.begin()
    built.writers.begin()
    assert [len(state.slices) for state in built.writers._states.values()] == [2, 0]
    assert len(built.writers.references) == 1


def test_what_a_slice_finishes_has_arrived():
    built = Built(1)
    built.give(2)
    written = []
    while len(written) < 2:
        built.writers.begin()
        written += built.writers.collect(built.wait())
    assert {t.prompt_id for t in written} == {"p0", "p1"}
    assert built.buffer.num_writing() == 0
    [(step, entries)] = built.buffer.waiting()
    assert (step, [entry.arrived_at for entry in entries.values()]) == (0, [built.clock.now] * 2)


def test_a_slice_that_is_heard_of_late_does_not_lower_a_version():
    built = Built(1)
    built.give(1)
    built.writers.begin()
    ended = built.wait()  # decoded under version 0
    built.writers.hold(0, 4)
    built.writers.collect(ended)
    assert built.writers.find_free(lambda version: version >= 4) == (0, 4)


def test_a_worker_that_leaves_is_waited_for_no_more_and_its_prompts_are_free():
    built = Built(2)
    assert sorted(built.give(4)) == [0, 0, 1, 1]
    built.writers.begin()
    built.writers.leave(0)
    assert built.writers.members == {1}
    assert len(built.writers.references) == 1
    assert len(built.buffer.handed_back()) == 2
    assert built.writers.find_free(lambda version: True) == (1, 0)


def test_a_worker_was_busy_for_as_long_as_it_says_however_late_it_is_heard_of():
    built = Built(1)
    built.give(1)  # three tokens: two slices of a second, and a third that nobody begins
    built.writers.begin()
    built.clock.run_until(lambda: False, 10.0)
    for _ in range(2):
        built.writers.collect(built.writers.references)
    activity = built.writers.workers.pop_activity()
    assert (activity.busy_seconds, activity.worker_seconds) == (2.0, 10.0)


def _run_for(built, seconds):
    while built.clock.now < seconds:
        built.writers.begin()
        built.writers.collect(built.wait())


def test_a_worker_whose_slices_bring_no_token_is_stuck_once_that_has_lasted():
    built = Built(1, rate=1e-6)
    built.clock.run_until(lambda: False, 50.0)  # before it is given anything it owes nothing
    built.give(1)
    _run_for(built, 55.0)
    assert built.writers.find_stuck(10.0) == []
    built.clock.run_until(lambda: False, 1000.0)  # as during an evaluation: nobody collects
    _run_for(built, 1004.0)
    assert built.writers.find_stuck(10.0) == []
    _run_for(built, 1010.0)
    assert built.writers.find_stuck(10.0) == [0]
    built.writers.leave(0, is_lost=True)
    assert built.writers.find_stuck(0.0) == []


def test_a_worker_that_writes_a_token_now_and_then_is_not_stuck():
    built = Built(1, rate=0.1)
    built.give(1)
    _run_for(built, 29.0)
    assert built.writers.find_stuck(11.0) == []
