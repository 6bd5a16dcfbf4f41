from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Iterator, Mapping

import pytest

from distill_system.observe.activity import PoolClock, Wait
from distill_system.observe.bottleneck import Bottleneck, find_bottleneck, shares_cores
from distill_system.records import PoolActivity

BATCH = 24
SERVERS = ("student_rollout", "teacher_rollout", "teacher_scoring")
POOLS = (*SERVERS, "learner")


class Pipeline:
    """A distillation as a queueing system, event by event: students and teachers write sequences,
    scorers read each, the learner steps on a batch of both streams once all of it is read.

    window: batches issued and not yet learned from.  barrier: a batch is read only when all of it
    is written.  Service times are the same for every sequence; learner ranks share one step.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        service: Mapping[str, float],
        *,
        window: int,
        barrier: bool,
    ) -> None:
        self.service, self.window, self.barrier = service, window, barrier
        self.counts = counts
        self.clocks = {pool: PoolClock(range(count), 0.0) for pool, count in counts.items()}
        self.idle = {pool: list(range(counts[pool])) for pool in SERVERS}
        self.queues: dict[str, deque[int]] = {pool: deque() for pool in SERVERS}
        self.written: Counter[int] = Counter()
        self.scored: Counter[int] = Counter()
        self.issued = self.learned = 0
        self.is_learning = False
        self.events: list[tuple[float, int, str, int, int]] = []
        self.order = itertools.count()
        self.per_batch = BATCH * sum(service[pool] > 0 for pool in SERVERS[:2])

    def run(self, steps: int) -> tuple[float, dict[str, PoolActivity]]:
        """Seconds per step over the second half of the run, and what the pools did in it."""
        self.start_what_can(0.0)
        half = 0.0
        while True:
            now, _, pool, server, batch = heapq.heappop(self.events)
            self.finish(pool, server, batch, now)
            if pool == "learner" and self.learned in (steps // 2, steps):
                activity = {name: clock.pop(now) for name, clock in self.clocks.items()}
                if self.learned == steps:
                    return (now - half) / (steps - steps // 2), activity
                half = now
            self.start_what_can(now)

    def finish(self, pool: str, server: int, batch: int, now: float) -> None:
        if pool == "learner":
            for rank in range(self.counts[pool]):
                self.clocks[pool].end(rank, now)
            self.learned += 1
            self.is_learning = False
            return
        self.clocks[pool].end(server, now)
        self.idle[pool].append(server)
        if pool == "teacher_scoring":
            self.scored[batch] += 1
            return
        self.written[batch] += 1
        if not self.barrier:
            self.queues["teacher_scoring"].append(batch)
        elif self.written[batch] == self.per_batch:
            self.queues["teacher_scoring"].extend([batch] * self.per_batch)

    def start_what_can(self, now: float) -> None:
        while self.issued < self.learned + self.window:
            for pool in SERVERS[:2]:
                if self.service[pool] > 0:
                    self.queues[pool].extend([self.issued] * BATCH)
            self.issued += 1
        for pool in SERVERS:
            while self.queues[pool] and self.idle[pool]:
                batch, server = self.queues[pool].popleft(), self.idle[pool].pop()
                self.clocks[pool].begin(server, now)
                self.schedule(now + self.service[pool], pool, server, batch)
            reason = Wait.STARVED if pool == "teacher_scoring" else Wait.BLOCKED
            self.clocks[pool].waits(reason, now)
        if not self.is_learning and self.scored[self.learned] == self.per_batch:
            self.is_learning = True
            for rank in range(self.counts["learner"]):
                self.clocks["learner"].begin(rank, now)
            seconds = self.service["learner"] / self.counts["learner"]
            self.schedule(now + seconds, "learner", 0, self.learned)

    def schedule(self, at: float, pool: str, server: int, batch: int) -> None:
        heapq.heappush(self.events, (at, next(self.order), pool, server, batch))


def simulate(
    counts: tuple[int, ...], service: tuple[float, ...], *, window: int, barrier: bool = False
) -> tuple[float, dict[str, PoolActivity]]:
    named = dict(zip(POOLS, counts, strict=True)), dict(zip(POOLS, service, strict=True))
    return Pipeline(*named, window=window, barrier=barrier).run(steps=40)


def one_more_of_each(counts: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for index, pool in enumerate(POOLS):
        yield pool, (*counts[:index], counts[index] + 1, *counts[index + 1 :])


# Workers of each pool; seconds per sequence, and of a step for one learner rank.
STREAMING = {
    "student_rollout": ((2, 1, 1, 1), (1.0, 0.2, 0.1, 4.0)),
    "student_rollout, many": ((6, 2, 2, 1), (2.0, 0.3, 0.2, 3.0)),
    "teacher_rollout": ((4, 1, 1, 2), (0.5, 0.5, 0.08, 4.0)),
    "teacher_scoring": ((4, 2, 2, 2), (0.5, 0.25, 0.25, 6.0)),
    "learner": ((4, 2, 2, 1), (0.4, 0.2, 0.05, 6.0)),
    "student_rollout, without teacher text": ((2, 1, 1, 1), (1.0, 0.0, 0.2, 4.0)),
}


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("case", STREAMING)
def test_of_a_streaming_run_the_bounding_pool_and_its_gain_are_those_of_a_simulation(case, window):
    counts, service = STREAMING[case]
    now, activity = simulate(counts, service, window=window)
    bottleneck = find_bottleneck(activity, is_asynchronous=True)
    assert bottleneck is not None
    gains = {}
    for pool, more in one_more_of_each(counts):
        if service[POOLS.index(pool)] > 0:
            gains[pool] = now / simulate(more, service, window=window)[0]
    assert bottleneck.is_bound
    assert bottleneck.pool == max(gains, key=lambda pool: gains[pool]) == case.split(",")[0]
    assert bottleneck.speedup == bottleneck.speedups[bottleneck.pool]
    assert {pool: bottleneck.speedups[pool] for pool in gains} == pytest.approx(gains, rel=0.1)
    assert gains[bottleneck.pool] > 1.1  # the case says something


@pytest.mark.parametrize("case", STREAMING)
def test_the_pool_that_is_said_to_bound_next_bounds_once_the_worker_is_there(case):
    counts, service = STREAMING[case]
    bottleneck = find_bottleneck(simulate(counts, service, window=5)[1], is_asynchronous=True)
    assert bottleneck is not None
    more = dict(one_more_of_each(counts))[bottleneck.pool]
    after = find_bottleneck(simulate(more, service, window=5)[1], is_asynchronous=True)
    assert after is not None
    assert bottleneck.next_pool == after.pool


@pytest.mark.parametrize("case", STREAMING)
def test_workers_said_to_be_spare_can_go_one_pool_at_a_time(case):
    counts, service = STREAMING[case]
    now, activity = simulate(counts, service, window=5)
    bottleneck = find_bottleneck(activity, is_asynchronous=True)
    assert bottleneck is not None
    assert bottleneck.pool not in bottleneck.spare
    for pool, spare in bottleneck.spare.items():
        index = POOLS.index(pool)
        fewer = (*counts[:index], counts[index] - spare, *counts[index + 1 :])
        assert simulate(fewer, service, window=5)[0] == pytest.approx(now, rel=0.05)


def test_a_pool_far_too_large_is_found():
    _, activity = simulate((2, 4, 1, 1), (1.0, 0.2, 0.1, 4.0), window=5)
    bottleneck = find_bottleneck(activity, is_asynchronous=True)
    assert bottleneck is not None
    assert bottleneck.spare == {"teacher_rollout": 3}
    assert "teacher_rollout has 3 more than it needs" in bottleneck.line


SYNCHRONOUS = {
    "student_rollout": ((2, 2, 2, 2), (1.0, 0.2, 0.1, 10.0)),
    "teacher_scoring": ((8, 4, 1, 4), (1.0, 0.2, 0.3, 10.0)),
    "learner": ((8, 4, 4, 1), (1.0, 0.2, 0.1, 10.0)),
}


@pytest.mark.parametrize("case", SYNCHRONOUS)
def test_of_a_synchronous_run_the_pool_worth_most_and_its_gain_are_those_of_a_simulation(case):
    counts, service = SYNCHRONOUS[case]
    # Whole batches take turns; without the teacher's text, which is written a step ahead.
    service = (service[0], 0.0, *service[2:])
    now, activity = simulate(counts, service, window=1, barrier=True)
    bottleneck = find_bottleneck(activity, is_asynchronous=False)
    assert bottleneck is not None
    gains = {
        pool: now / simulate(more, service, window=1, barrier=True)[0]
        for pool, more in one_more_of_each(counts)
    }
    assert bottleneck.pool == max(gains, key=lambda pool: gains[pool]) == case
    assert {pool: bottleneck.speedups[pool] for pool in gains} == pytest.approx(gains, rel=0.1)


def pool(workers: int, busy: float, starved: float = 0.0, blocked: float = 0.0) -> PoolActivity:
    return PoolActivity(
        num_workers=workers,
        seconds=100.0,
        busy_seconds=busy * workers * 100,
        starved_seconds=starved * workers * 100,
        blocked_seconds=blocked * workers * 100,
    )


def find(is_asynchronous: bool = True, **pools: PoolActivity) -> Bottleneck:
    found = find_bottleneck(pools, is_asynchronous=is_asynchronous)
    assert found is not None
    return found


def test_the_line_says_who_bounds_who_waits_what_a_worker_brings_and_who_bounds_then():
    found = find(
        student_rollout=pool(2, 0.97),
        teacher_scoring=pool(1, 0.7, 0.3),
        learner=pool(1, 0.59, 0.41),
    )
    assert found.line == (
        "student_rollout bounds the run (97% busy, learner waits 41% of the time for it): "
        "one more worker would bring 1.37x, then teacher_scoring bounds"
    )
    found = find(student_rollout=pool(2, 0.5, 0, 0.45), learner=pool(1, 0.99))
    assert found.line == (
        "learner bounds the run (99% busy, student_rollout waits 45% of the time for it): "
        "one more rank at the next start would bring 1.96x, then student_rollout bounds"
    )


def test_a_pool_that_needs_more_than_one_worker_still_bounds():
    found = find(student_rollout=pool(2, 0.96), learner=pool(1, 0.2, 0.8))
    assert found.next_pool == "student_rollout"
    assert found.speedup == pytest.approx(1 / (1 - 0.96 / 3))
    assert found.line.endswith("then it still bounds")


def test_where_everyone_waits_for_the_window_the_advice_is_more_staleness():
    found = find(
        student_rollout=pool(2, 0.4, 0.1, 0.5),
        teacher_scoring=pool(1, 0.3, 0.7),
        learner=pool(1, 0.35, 0.65),
    )
    assert not found.is_bound
    assert found.line == (
        "no pool bounds the run (student_rollout, the busiest, 40% busy; student_rollout waits 50% "
        "of the time for room in the window): raise max_staleness"
    )


def test_a_synchronous_run_is_told_as_turns():
    found = find(
        is_asynchronous=False,
        student_rollout=pool(1, 0.5, 0.5),
        teacher_scoring=pool(1, 0.2, 0.8),
        learner=pool(1, 0.25, 0.75),
    )
    assert found.speedup == pytest.approx(1 / (1 - 0.5 / 2))
    assert found.line.startswith("the pools take turns, student_rollout has 50% of the step: ")


def test_the_teachers_text_written_ahead_brings_nothing_to_a_synchronous_run():
    pools = {
        "student_rollout": pool(1, 0.4, 0.6),
        "teacher_rollout": pool(1, 0.6, 0.4),
        "teacher_scoring": pool(1, 0.2, 0.8),
        "learner": pool(1, 0.4, 0.6),
    }
    found = find(is_asynchronous=False, **pools)
    assert found.pool != "teacher_rollout"
    assert found.speedup == pytest.approx(1 / 0.8)


def test_a_run_that_has_not_worked_has_no_bottleneck():
    assert find_bottleneck({"learner": pool(1, 0.0, 1.0)}, is_asynchronous=True) is None
    assert find_bottleneck({}, is_asynchronous=True) is None


@pytest.mark.parametrize(
    ("settings", "cores", "shared"),
    [
        ({}, 2, True),
        ({}, 4, True),
        ({}, 8, False),
        ({}, None, False),
        ({"learner": {"threads": 5}}, 8, True),
        ({"rollout": {"student_engine": {"threads": 6}}}, 8, True),
    ],
)
def test_workers_that_have_all_cores_between_them_share_them(settings, cores, shared) -> None:
    pools = {name: {"count": 1, "gpus": 0.0} for name in POOLS}
    assert shares_cores({"pools": pools, **settings}, cores) is shared
    on_gpus = {name: {"count": 4, "gpus": 1.0} for name in POOLS}
    assert not shares_cores({"pools": {**on_gpus, "evaluation": None}}, 2)


def test_no_worker_more_is_advised_where_cores_are_shared() -> None:
    pools = {
        name: PoolActivity(num_workers=1, seconds=10.0, busy_seconds=busy)
        for name, busy in (("student_rollout", 2.0), ("teacher_scoring", 1.0), ("learner", 7.0))
    }
    alone = find_bottleneck(pools, is_asynchronous=False)
    shared = find_bottleneck(pools, is_asynchronous=False, shares_cores=True)
    assert alone is not None
    assert shared is not None
    assert "one more rank at the next start would bring" in alone.line
    assert "one more" not in shared.line
    assert shared.line.startswith("the pools take turns, learner has 70% of the step: its workers")
