"""Which pool bounds a run, and what one more worker of it would bring: activities in, advice out.

The model: pool p needs b_p busy worker-seconds a step, so n_p workers take t_p = b_p / n_p for it.
A streaming run's step takes max over p of t_p, since the pools work beside each other; a
synchronous one takes the sum of those that take turns. What the measured step has beyond that
stays as it is. Everything is told as a share of the measured step, where t_p is the pool's busy
share, so neither the number of steps nor their length is needed. Limits: docs/monitoring.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distill_system.records import PoolActivity

LEARNER = "learner"
TEACHER_TEXT = "teacher_rollout"
"""In a synchronous run the teacher writes one step ahead, beside the learner and the student."""
STUDENT_TEXT = "student_rollout"

FULLY_BUSY = 0.9
"""A pool that would be busier than this with a worker less has none to spare."""
UNBOUND = 0.5
"""Where the busiest pool of a streaming run works less than this, no pool bounds the run."""
UNCHANGED = 1.01
"""A step this much longer counts as none."""
LARGE_WAIT = 0.25
"""A blocked share of the student's rollouts that tells of a full window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """What bounds a run.

    pool: the one whose next worker brings most.  is_bound: False where no pool bounds the run.
    busy_share: of that pool, 0..1.  waiting_pool, waiting_share: who waits for it, and how much of
    its time; None and 0 in a synchronous run.
    speedup: step time now over step time with one more worker of it.
    next_pool: which bounds then; the same one, where it still does.
    spare: pool -> workers more than needed; pools without are left out.
    """

    pool: str
    is_asynchronous: bool
    is_bound: bool
    busy_share: float
    waiting_pool: str | None
    waiting_share: float
    speedup: float
    next_pool: str
    spare: dict[str, int]

    @property
    def line(self) -> str:
        """One line for a person."""
        return "; ".join([f"{self._cause}: {self._advice}", *self._spare_words()])

    @property
    def _cause(self) -> str:
        busy = f"{self.busy_share:.0%}"
        if not self.is_asynchronous:
            return f"the pools take turns, {self.pool} has {busy} of the step"
        waits = f"{self.waiting_pool} waits {self.waiting_share:.0%} of the time for"
        if self.is_bound:
            whom = "" if self.waiting_pool is None else f", {waits} it"
            return f"{self.pool} bounds the run ({busy} busy{whom})"
        whom = "" if self.waiting_pool is None else f"; {waits} room in the window"
        return f"no pool bounds the run ({self.pool}, the busiest, {busy} busy{whom})"

    @property
    def _advice(self) -> str:
        if not self.is_bound and self.waiting_pool is not None:
            return "raise max_staleness"
        unit = "rank at the next start" if self.pool == LEARNER else "worker"
        brings = f"one more {unit} would bring {self.speedup:.2f}x"
        if not self.is_asynchronous:
            return f"{brings}; max_staleness 1 lets them work beside each other"
        if not self.is_bound:
            return brings
        still = self.next_pool == self.pool
        return f"{brings}, then {'it still' if still else self.next_pool} bounds"

    def _spare_words(self) -> list[str]:
        return [f"{pool} has {count} more than it needs" for pool, count in self.spare.items()]


def find_bottleneck(
    pools: Mapping[str, PoolActivity], *, is_asynchronous: bool
) -> Bottleneck | None:
    """Which of the pools bounds the run; None where none of them has worked.

    Args:
        pools: student_rollout, teacher_rollout, teacher_scoring, learner, over the same stretch of
            whole steps; one that the run does not have may be missing.
        is_asynchronous: whether steps overlap, that is max_staleness > 0.
    """
    known = {name: pool for name, pool in pools.items() if pool.worker_seconds > 0}
    if not any(pool.busy_seconds > 0 for pool in known.values()):
        return None
    model = _StepModel(known, is_asynchronous=is_asynchronous)
    pool = model.find_dearest()
    more = model.change(pool, 1)
    busy = known[pool].busy_share
    is_bound = not is_asynchronous or busy >= UNBOUND
    waiting_pool, waiting_share = None, 0.0
    if is_asynchronous:
        waiting_pool, waiting_share = _find_waiting(pool, known, is_bound=is_bound)
    return Bottleneck(
        pool=pool,
        is_asynchronous=is_asynchronous,
        is_bound=is_bound,
        busy_share=busy,
        waiting_pool=waiting_pool,
        waiting_share=waiting_share,
        speedup=model.step(model.times) / model.step(more),
        next_pool=_largest(more) if is_asynchronous else pool,
        spare=model.count_spare(),
    )


class _StepModel:
    """Step time from the pools' own times, all as shares of the measured step."""

    def __init__(self, pools: Mapping[str, PoolActivity], *, is_asynchronous: bool) -> None:
        self._is_streaming = is_asynchronous
        self._workers = {name: pool.num_workers for name, pool in pools.items()}
        self.times = {name: pool.busy_share for name, pool in pools.items()}
        # Beyond the model: what nobody works in, less what overlaps although the model adds it up.
        self._rest = 1.0 - self._overlapped(self.times)

    def step(self, times: Mapping[str, float]) -> float:
        """The step's time; never less than the longest of the pools' own."""
        return max(self._overlapped(times) + self._rest, *times.values())

    def change(self, pool: str, by: float) -> dict[str, float]:
        """The pools' own times with so many workers more, or fewer, in one of them."""
        count = self._workers[pool]
        return {**self.times, pool: self.times[pool] * count / (count + by)}

    def find_dearest(self) -> str:
        """The pool whose next worker saves most of the step; the busiest where none does."""
        if self._is_streaming:
            return _largest(self.times)
        saved = {pool: -self.step(self.change(pool, 1)) for pool in self.times}
        return max(saved, key=lambda pool: (saved[pool], self.times[pool]))

    def count_spare(self) -> dict[str, int]:
        """Pool -> workers that could go, this pool's alone, without a longer step."""
        spare = {pool: self._count_spare(pool) for pool in self.times}
        return {pool: count for pool, count in spare.items() if count > 0}

    def _count_spare(self, pool: str) -> int:
        for count in range(round(self._workers[pool]) - 1, 0, -1):
            fewer = self.change(pool, -count)
            longest = max(time for name, time in self.times.items() if name != pool)
            has_room = fewer[pool] <= FULLY_BUSY * longest
            if has_room and self.step(fewer) <= UNCHANGED * self.step(self.times):
                return count
        return 0

    def _overlapped(self, times: Mapping[str, float]) -> float:
        if self._is_streaming:
            return max(times.values())
        turns = {name: time for name, time in times.items() if name != TEACHER_TEXT}
        reading = turns.pop("teacher_scoring", 0.0)
        return max(sum(turns.values()), times.get(TEACHER_TEXT, 0.0)) + reading


def _largest(times: Mapping[str, float]) -> str:
    return max(times, key=lambda pool: times[pool])


def _find_waiting(
    pool: str, pools: Mapping[str, PoolActivity], *, is_bound: bool
) -> tuple[str | None, float]:
    """Who waits and how much of its time: the learner for text, or the student's rollouts for room.

    An idle learner is starved; rollouts are blocked where the window is full.
    """
    if is_bound and pool != LEARNER:
        return (LEARNER, pools[LEARNER].starved_share) if LEARNER in pools else (None, 0.0)
    blocked = pools[STUDENT_TEXT].blocked_share if STUDENT_TEXT in pools else 0.0
    if not is_bound and blocked < LARGE_WAIT:
        return None, 0.0
    return (STUDENT_TEXT, blocked) if STUDENT_TEXT in pools else (None, 0.0)
