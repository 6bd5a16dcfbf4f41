"""A pool's time, counted from the calls that pass through its group."""

from __future__ import annotations

import pytest
from simulated_pools import Clock, SimulatedWorkers

from distill_system.streams.watched_workers import WatchedWorkers


class Sleeper:
    """Each call takes as long as it is told, of which it works a half."""

    def sleep(self, seconds):
        return seconds / 2, seconds


@pytest.fixture
def build():
    def make(count):
        clock = Clock()
        workers = SimulatedWorkers(clock, [Sleeper() for _ in range(count)])
        return clock, workers, WatchedWorkers(workers, clock)

    return make


def test_a_call_is_busy_time_and_the_rest_is_waiting(build):
    clock, _, watched = build(2)
    assert watched.finish([watched.start(0, "sleep", 4.0)], what="sleep") == [2.0]
    clock.now = 10.0
    activity = watched.pop_activity()
    assert (activity.busy_seconds, activity.starved_seconds) == (4.0, 16.0)
    assert watched.calls == []


def test_a_worker_may_say_itself_how_long_it_worked(build):
    clock, _, watched = build(1)
    calls = [watched.start(0, "sleep", 4.0), watched.start(0, "sleep", 2.0)]
    watched.finish(calls, what="sleep", busy_seconds=lambda half: half)
    clock.now = 10.0
    assert watched.pop_activity().busy_seconds == pytest.approx(3.0)


def test_whoever_waits_by_other_means_says_what_has_ended(build):
    clock, workers, watched = build(2)
    calls = [watched.start(0, "sleep", 1.0), watched.start(1, "sleep", 9.0)]
    done = workers.wait_any(calls, what="sleep", seconds=5.0)
    assert done == calls[:1]
    watched.end([*done, object()])  # calls of other groups are none of its business
    assert watched.calls == calls[1:]
    clock.now = 5.0
    assert watched.pop_activity().busy_seconds == pytest.approx(1.0 + 5.0)
    assert watched.finish(calls, what="sleep") == [0.5, 4.5]
    assert watched.pop_activity().busy_seconds == pytest.approx(4.0)


def test_workers_count_for_as_long_as_they_belong(build):
    clock, workers, watched = build(2)
    call = watched.start(1, "sleep", 50.0)
    clock.now = 4.0
    watched.leave(1)
    assert (watched.present, watched.calls) == ({0}, [])
    watched.end([call])
    workers.objects[7] = Sleeper()
    watched.join(7)
    clock.now = 10.0
    assert watched.pop_activity().worker_seconds == pytest.approx(10 + 4 + 6)
    assert watched.members == (0, 1, 7)
    assert watched.count == 3
