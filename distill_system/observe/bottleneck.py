"""Which pool bounds a run, and what one more worker of it would bring: activities in, advice out.

The model: pool p needs b_p busy worker-seconds a step, so its n_p workers take t_p = b_p / n_p.
In an asynchronous run the pools work side by side, and a step takes the largest t_p. In a
synchronous run they take turns, and it takes the sum of their t_p. Whatever the measured step takes
beyond that is assumed to stay. All times are shares of the measured step, in which t_p is simply
the pool's busy share. Limits of the model: docs/monitoring.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_system.records import PoolActivity

LEARNER = "learner"
TEACHER_ROLLOUT = "teacher_rollout"
"""In a synchronous run the teacher generates one step ahead, beside the learner and the student."""
STUDENT_ROLLOUT = "student_rollout"

FULLY_BUSY = 0.9
"""Longest time of a pool without its spare workers, as a share of the others' longest time."""
UNBOUND = 0.5
"""If the busiest pool of an asynchronous run is less busy than this, no pool bounds the run."""
UNCHANGED = 1.01
"""A step that gets longer by less than this factor counts as unchanged."""
LARGE_WAIT = 0.25
"""A blocked share of the student's rollouts above this shows that the window is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """What bounds a run.

    pool: the one whose next worker brings most.  busy_share: that pool's, 0..1.
    is_bound: False if no pool bounds the run.
    waiting_pool, waiting_share: a pool that waits for it, and the share of its time that it waits;
    None and 0 in a synchronous run.
    speedup: step time now over step time with one more worker of the pool.
    next_pool: the pool that bounds the run then; often the same one.
    speedups: the same of every pool, by name.
    spare: pool -> workers that it could do without; pools that need all are left out.
    shares_cores: whether the workers have all cores of the machine between them already.
    """

    pool: str
    is_asynchronous: bool
    shares_cores: bool = False
    is_bound: bool
    busy_share: float
    waiting_pool: str | None
    waiting_share: float
    speedup: float
    next_pool: str
    speedups: dict[str, float]
    spare: dict[str, int]

    @property
    def line(self) -> str:
        """One line for a person: the cause, advice, and spare workers."""
        spare = [f"{pool} has {count} more than it needs" for pool, count in self.spare.items()]
        return "; ".join([f"{self._cause}: {self._advice}", *spare])

    @property
    def _cause(self) -> str:
        busy = f"{self.busy_share:.0%}"
        if not self.is_asynchronous:
            return f"the pools take turns, {self.pool} has {busy} of the step"
        waits = f"{self.waiting_pool} waits {self.waiting_share:.0%} of the time for"
        if self.is_bound:
            waiting = "" if self.waiting_pool is None else f", {waits} it"
            return f"{self.pool} bounds the run ({busy} busy{waiting})"
        waiting = "" if self.waiting_pool is None else f"; {waits} room in the window"
        return f"no pool bounds the run ({self.pool}, the busiest, {busy} busy{waiting})"

    @property
    def _advice(self) -> str:
        if not self.is_bound and self.waiting_pool is not None:
            return "raise max_staleness"
        if self.shares_cores:
            return "its workers share this machine's cores: faster with more of them, or with a GPU"
        unit = "rank at the next start" if self.pool == LEARNER else "worker"
        brings = f"one more {unit} would bring {self.speedup:.2f}x"
        if not self.is_asynchronous:
            return f"{brings}; max_staleness 1 lets them work beside each other"
        if not self.is_bound:
            return brings
        still = self.next_pool == self.pool
        return f"{brings}, then {'it still' if still else self.next_pool} bounds"


def find_bottleneck(
    pools: Mapping[str, PoolActivity], *, is_asynchronous: bool, shares_cores: bool = False
) -> Bottleneck | None:
    """Which of the pools bounds the run; None if none of them has been busy.

    pools: student_rollout, teacher_rollout, teacher_scoring and learner, over the same whole
        steps; a pool that the run does not have may be missing.
    is_asynchronous: whether steps overlap, that is max_staleness > 0.
    shares_cores: whether one worker more would only take cores from the others.
    """
    known = {name: pool for name, pool in pools.items() if pool.worker_seconds > 0}
    if not any(pool.busy_seconds > 0 for pool in known.values()):
        return None
    model = _StepModel(known, is_asynchronous=is_asynchronous)
    pool = model.find_limiting_pool()
    more = model.resize(pool, 1)
    busy = known[pool].busy_share
    is_bound = not is_asynchronous or busy >= UNBOUND
    waiting_pool, waiting_share = None, 0.0
    if is_asynchronous:
        waiting_pool, waiting_share = _find_waiting(pool, known, is_bound=is_bound)
    return Bottleneck(
        pool=pool,
        is_asynchronous=is_asynchronous,
        shares_cores=shares_cores,
        is_bound=is_bound,
        busy_share=busy,
        waiting_pool=waiting_pool,
        waiting_share=waiting_share,
        speedup=model.speedup(pool),
        next_pool=_largest(more) if is_asynchronous else pool,
        speedups={name: model.speedup(name) for name in known},
        spare=model.count_spare(),
    )


def shares_cores(config: Mapping[str, Any], cores: int | None) -> bool:
    """Whether a run's workers without a GPU have all cores of one machine between them.

    config: the resolved configuration as JSON.  cores: of the machine; None: unknown, as where the
        workers may stand on several.
    """
    threads = {
        "student_rollout": ("rollout", "student_engine"),
        "evaluation": ("rollout", "student_engine"),
        "teacher_rollout": ("rollout", "teacher_engine"),
        "teacher_scoring": ("scoring",),
        "learner": ("learner",),
    }
    wanted = 0
    for name, pool in (config.get("pools") or {}).items():
        if name in threads and pool and not pool.get("gpus"):
            part: Any = config
            for key in threads[name]:
                part = part.get(key) or {}
            wanted += int(pool.get("count", 1)) * int(part.get("threads", 1))
    return cores is not None and wanted >= cores


class _StepModel:
    """Step time from the pools' own times, all as shares of the measured step."""

    def __init__(self, pools: Mapping[str, PoolActivity], *, is_asynchronous: bool) -> None:
        self._is_asynchronous = is_asynchronous
        self._workers = {name: pool.num_workers for name, pool in pools.items()}
        self.times = {name: pool.busy_share for name, pool in pools.items()}
        # What the model does not explain: time in which no pool works, minus overlap of pools
        # whose times a synchronous step adds up.
        self._rest = 1.0 - self._modelled(self.times)

    def step(self, times: Mapping[str, float]) -> float:
        """The step's time; never less than the longest of the pools' own times."""
        return max(self._modelled(times) + self._rest, *times.values())

    def resize(self, pool: str, by: float) -> dict[str, float]:
        """The pools' own times if one of them had `by` workers more."""
        count = self._workers[pool]
        return {**self.times, pool: self.times[pool] * count / (count + by)}

    def speedup(self, pool: str) -> float:
        """Step time now over step time with one more worker of the pool."""
        return self.step(self.times) / self.step(self.resize(pool, 1))

    def find_limiting_pool(self) -> str:
        """The pool whose next worker shortens the step most; the busiest if none does."""
        if self._is_asynchronous:
            return _largest(self.times)
        saved = {pool: -self.step(self.resize(pool, 1)) for pool in self.times}
        return max(saved, key=lambda pool: (saved[pool], self.times[pool]))

    def count_spare(self) -> dict[str, int]:
        """Pool -> workers that it could lose without a longer step, if only this pool changes."""
        spare = {pool: self._count_spare(pool) for pool in self.times}
        return {pool: count for pool, count in spare.items() if count > 0}

    def _count_spare(self, pool: str) -> int:
        for count in range(round(self._workers[pool]) - 1, 0, -1):
            fewer = self.resize(pool, -count)
            others = (time for name, time in self.times.items() if name != pool)
            longest = max(others, default=0.0)  # a pool that was recorded alone
            has_room = fewer[pool] <= FULLY_BUSY * longest
            if has_room and self.step(fewer) <= UNCHANGED * self.step(self.times):
                return count
        return 0

    def _modelled(self, times: Mapping[str, float]) -> float:
        """The step's time by the model alone."""
        if self._is_asynchronous:
            return max(times.values())
        # Student and learner take turns, the teacher generates beside both, then scoring follows.
        turns = {name: time for name, time in times.items() if name != TEACHER_ROLLOUT}
        scoring = turns.pop("teacher_scoring", 0.0)
        return max(sum(turns.values()), times.get(TEACHER_ROLLOUT, 0.0)) + scoring


def _largest(times: Mapping[str, float]) -> str:
    return max(times, key=lambda pool: times[pool])


def _find_waiting(
    pool: str, pools: Mapping[str, PoolActivity], *, is_bound: bool
) -> tuple[str | None, float]:
    """The pool that waits, and the share of its time that it waits.

    If a pool before the learner bounds the run, the learner waits for text (it is starved).
    Otherwise the student's rollouts wait for room in a full window (they are blocked).
    """
    if is_bound and pool != LEARNER:
        return (LEARNER, pools[LEARNER].starved_share) if LEARNER in pools else (None, 0.0)
    blocked = pools[STUDENT_ROLLOUT].blocked_share if STUDENT_ROLLOUT in pools else 0.0
    if not is_bound and blocked < LARGE_WAIT:
        return None, 0.0
    return (STUDENT_ROLLOUT, blocked) if STUDENT_ROLLOUT in pools else (None, 0.0)
