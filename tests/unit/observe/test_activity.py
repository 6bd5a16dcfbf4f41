from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_system.observe.activity import (
    PoolClock,
    RecentActivity,
    Wait,
    activity_metrics,
    join_stretches,
    wire_metrics,
)
from distill_system.records import PoolActivity

TICKS = 30
WORKERS = range(3)

# One event: at which tick, what, for whom. What does not apply in the pool's state is left out.
EVENTS = st.lists(
    st.tuples(
        st.integers(0, TICKS),
        st.sampled_from(["begin", "end", "join", "leave", "starved", "blocked", "pop"]),
        st.sampled_from(WORKERS),
    ),
    max_size=40,
).map(lambda events: sorted(events, key=lambda event: event[0]))


class TickByTick:
    """The same pool in unit ticks: what each worker does in each tick is looked at and counted."""

    def __init__(self) -> None:
        self.calls = {0: 0}
        self.wait = "starved"
        self.seconds = dict.fromkeys(("busy", "starved", "blocked"), 0)

    def tick(self) -> None:
        for calls in self.calls.values():
            self.seconds["busy" if calls else self.wait] += 1


@given(EVENTS)
@settings(max_examples=150)
def test_busy_starved_and_blocked_agree_with_counting_tick_by_tick(events):
    clock, slow = PoolClock([0], 0.0), TickByTick()
    popped, now = [], 0
    for at, what, worker in [*events, (TICKS, "pop", 0)]:
        for _ in range(at - now):
            slow.tick()
        now = at
        if what in ("starved", "blocked"):
            clock.waits(Wait(what), now)
            slow.wait = what
        elif what == "pop":
            popped.append(clock.pop(now))
        elif what == "join" and worker not in slow.calls:
            clock.join(worker, now)
            slow.calls[worker] = 0
        elif what == "leave" and worker in slow.calls:
            clock.leave(worker, now)
            del slow.calls[worker]
        elif what == "begin" and worker in slow.calls:
            clock.begin(worker, now)
            slow.calls[worker] += 1
        elif what == "end" and slow.calls.get(worker):
            clock.end(worker, now)
            slow.calls[worker] -= 1
    assert sum(pool.busy_seconds for pool in popped) == pytest.approx(slow.seconds["busy"])
    assert sum(pool.starved_seconds for pool in popped) == pytest.approx(slow.seconds["starved"])
    assert sum(pool.blocked_seconds for pool in popped) == pytest.approx(slow.seconds["blocked"])
    assert sum(pool.seconds for pool in popped) == TICKS


@given(EVENTS, st.lists(st.floats(0.0, 50.0), min_size=40, max_size=40))
@settings(max_examples=150)
def test_the_three_parts_add_up_to_the_workers_time_whatever_workers_report(events, reports):
    clock, calls, stretch, now = PoolClock([0], 0.0), {0: 0}, 0, 0
    for (at, what, worker), report in zip(
        [*events, (TICKS, "pop", 0)], [*reports, 0.0], strict=False
    ):
        stretch += (at - now) * len(calls)
        now = at
        if what in ("starved", "blocked"):
            clock.waits(Wait(what), now)
        elif what == "pop":
            pool = clock.pop(now)
            parts = (pool.busy_seconds, pool.starved_seconds, pool.blocked_seconds)
            assert sum(parts) == pytest.approx(stretch)
            assert min(parts) >= 0
            if pool.seconds > 0:
                assert pool.num_workers * pool.seconds == pytest.approx(stretch)
            stretch = 0
        elif what == "join" and worker not in calls:
            clock.join(worker, now)
            calls[worker] = 0
        elif what == "leave" and worker in calls:
            clock.leave(worker, now)
            del calls[worker]
        elif what == "begin" and worker in calls:
            clock.begin(worker, now)
            calls[worker] += 1
        elif what == "end" and calls.get(worker):
            clock.end(worker, now, busy_seconds=report)
            calls[worker] -= 1


def test_two_idle_workers_are_fully_starved():
    pool = PoolClock([0, 1], 5.0).pop(15.0)
    assert (pool.num_workers, pool.seconds) == (2.0, 10.0)
    assert (pool.starved_seconds, pool.starved_share) == (20.0, 1.0)
    assert (pool.busy_share, pool.blocked_share) == (0.0, 0.0)


def test_a_call_cut_by_a_pop_is_put_right_by_what_its_worker_reports():
    clock = PoolClock([0], 0.0)
    clock.begin(0, 0.0)
    first = clock.pop(4.0)
    clock.end(0, 10.0, busy_seconds=7.0)
    second = clock.pop(12.0)
    assert (first.busy_seconds, first.starved_seconds) == (4.0, 0.0)
    assert (second.busy_seconds, second.starved_seconds) == (3.0, 5.0)


def test_two_calls_under_way_are_served_one_after_the_other():
    clock = PoolClock([0], 0.0)
    clock.begin(0, 0.0)
    clock.begin(0, 0.5)
    # Both end 1 s of work each; the driver hears of the first late, and of the second at once.
    clock.end(0, 1.75, busy_seconds=1.0)
    clock.end(0, 2.0, busy_seconds=1.0)
    activity = clock.pop(2.5)
    assert (activity.busy_seconds, activity.starved_seconds) == (2.0, 0.5)


def test_workers_that_join_and_leave_count_for_as_long_as_they_belong():
    clock = PoolClock([0, 1], 10.0)
    clock.waits(Wait.BLOCKED, 10.0)
    clock.leave(1, 12.0)
    clock.join(2, 16.0)
    activity = clock.pop(20.0)
    assert activity.num_workers == pytest.approx((10 + 2 + 4) / 10)
    assert activity.blocked_seconds == 16.0
    assert clock.pop(20.0).num_workers == 2  # no time has gone by: as many as there are


def test_what_is_handed_on_belongs_to_one_stretch():
    clock = PoolClock([0], 0.0)
    clock.hand_on(num_tokens=5, num_sequences=1)
    clock.hand_on(num_tokens=7, num_sequences=2)
    first, second = clock.pop(1.0, queued=3), clock.pop(2.0)
    assert (first.num_tokens, first.num_sequences, first.queued) == (12, 3, 3)
    assert (second.num_tokens, second.num_sequences, second.queued) == (0,) * 3


def activity(seconds: float, workers: float, busy: float, tokens: int = 0) -> PoolActivity:
    return PoolActivity(
        num_workers=workers,
        seconds=seconds,
        busy_seconds=busy,
        starved_seconds=workers * seconds - busy,
        num_tokens=tokens,
        queued=tokens,
    )


def test_two_stretches_joined_are_as_one_pop_over_both():
    cut, whole = PoolClock([0], 0.0), PoolClock([0], 0.0)
    halves = []
    for clock in (cut, whole):
        clock.begin(0, 1.0)
        clock.end(0, 3.0)
        if clock is cut:
            halves.append(clock.pop(4.0))
        clock.join(1, 5.0)
        clock.begin(1, 5.5)
        clock.hand_on(num_tokens=3)
    joined = join_stretches(halves[0], cut.pop(9.0, queued=2))
    assert joined == whole.pop(9.0, queued=2)


def test_recent_activity_forgets_what_is_old_but_never_keeps_too_little():
    short = RecentActivity(num_stretches=2, seconds=10.0)
    for _ in range(4):
        joined = short.add({"learner": activity(4.0, 1, 1.0)})
    assert joined["learner"].seconds == 12.0  # two stretches of 4 s would be less than 10 s
    long = RecentActivity(num_stretches=2, seconds=10.0)
    for _ in range(4):
        joined = long.add({"learner": activity(60.0, 1, 1.0)})
    assert joined["learner"].seconds == 120.0


def test_metrics_are_named_by_pool_and_rates_are_of_a_busy_worker():
    metrics = activity_metrics({"student_rollout": activity(10.0, 2, 5.0, tokens=100)})
    assert metrics == {
        "workers/student_rollout": 2,
        "busy_share/student_rollout": 0.25,
        "starved_share/student_rollout": 0.75,
        "blocked_share/student_rollout": 0.0,
        "queued/student_rollout": 100.0,
        "tokens_per_second/student_rollout": 20.0,
    }
    idle = activity_metrics({"learner": activity(10.0, 2, 0.0)})
    assert "tokens_per_second/learner" not in idle


def test_bytes_on_the_wire_are_told_per_response_token_and_field():
    metrics = wire_metrics({"features": 64_000, "logprobs": 4_000}, 1_000)
    assert metrics == {
        "bytes_per_teacher_token/features": 64.0,
        "bytes_per_teacher_token/logprobs": 4.0,
    }
    assert wire_metrics({"features": 0}, 0) == {}


def test_a_clock_that_runs_backwards_or_an_unknown_worker_is_our_mistake():
    clock = PoolClock([0], 5.0)
    with pytest.raises(AssertionError, match="backwards"):
        clock.begin(0, 4.0)
    with pytest.raises(AssertionError, match="not in the pool"):
        clock.begin(7, 6.0)
    with pytest.raises(AssertionError, match="no call under way"):
        clock.end(0, 6.0)
    with pytest.raises(AssertionError, match="already"):
        clock.join(0, 6.0)


def test_an_empty_pool_has_no_shares():
    pool = PoolClock([], 0.0).pop(3.0)
    assert (pool.num_workers, pool.busy_share, pool.starved_share) == (0.0, 0.0, 0.0)
    assert math.isfinite(pool.blocked_share)
