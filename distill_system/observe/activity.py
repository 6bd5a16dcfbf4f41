"""What a pool's workers do with their time: events of the driver's loop in, PoolActivity out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from distill_system.records import PoolActivity


class Wait(StrEnum):
    """Why an idle worker is idle: nothing to work on, or no room for what it would hand on."""

    STARVED = "starved"
    BLOCKED = "blocked"


@dataclass(slots=True)
class _Worker:
    """One worker; seconds are those of the stretch under way.

    counted_to: up to here its time has been counted.  call_since: since when it can have served
    the call that it has had longest.  balance: busy seconds that it reported, over all stretches,
    less those that earlier stretches were told of.
    """

    counted_to: float
    num_calls: int = 0
    call_since: float = 0.0
    called_seconds: float = 0.0
    starved_seconds: float = 0.0
    blocked_seconds: float = 0.0
    balance: float = 0.0


class PoolClock:
    """Adds up what the workers of one pool do, as the driver hears of it.

    Every call takes `now`, seconds of one clock that never runs backwards. A worker may have
    several calls under way; it serves one after the other. Each of its seconds is busy, starved or
    blocked: with a call under way it is busy for as long as the worker says, and starved for the
    rest, in which call and answer travel; without a call it is what `waits` said last.
    """

    def __init__(self, workers: Iterable[int], now: float) -> None:
        self._since = now
        self._wait = Wait.STARVED
        self._workers: dict[int, _Worker] = {}
        self._busy = self._starved = self._blocked = 0.0
        self._tokens = self._sequences = 0
        for worker in workers:
            self.join(worker, now)

    @property
    def workers(self) -> frozenset[int]:
        """Workers that belong to the pool now."""
        return frozenset(self._workers)

    def join(self, worker: int, now: float) -> None:
        """The worker belongs to the pool from now on, idle."""
        assert worker not in self._workers, f"worker {worker!r} is in the pool already"
        self._workers[worker] = _Worker(counted_to=now)

    def leave(self, worker: int, now: float) -> None:
        """The worker is gone, and with it the calls that it had under way."""
        self._count(self._find(worker), now)
        self._settle(self._workers.pop(worker), now)

    def begin(self, worker: int, now: float) -> None:
        """A call of the worker is under way."""
        found = self._find(worker)
        self._count(found, now)
        if found.num_calls == 0:
            found.call_since = now
        found.num_calls += 1

    def end(self, worker: int, now: float, *, busy_seconds: float | None = None) -> None:
        """A call of the worker has ended.

        busy_seconds: what the worker itself measured; None counts the whole call as work.
        """
        found = self._find(worker)
        assert found.num_calls > 0, f"worker {worker!r} has no call under way"
        self._count(found, now)
        found.num_calls -= 1
        found.balance += now - found.call_since if busy_seconds is None else busy_seconds
        found.call_since = now

    def waits(self, reason: Wait, now: float) -> None:
        """From now on, workers without a call wait for this reason."""
        if reason is not self._wait:
            for worker in self._workers.values():
                self._count(worker, now)
            self._wait = reason

    def hand_on(self, *, num_tokens: int = 0, num_sequences: int = 0) -> None:
        """Count what the pool has finished."""
        self._tokens += num_tokens
        self._sequences += num_sequences

    def pop(self, now: float, *, queued: int = 0) -> PoolActivity:
        """The stretch since the last pop, or since the beginning; a new one begins.

        A call that goes on counts as work up to now; what its worker reports at its end corrects
        the stretches to come, so that their sum is right.
        """
        for worker in self._workers.values():
            self._count(worker, now)
            self._settle(worker, now)
        seconds = now - self._since
        worker_seconds = self._busy + self._starved + self._blocked
        activity = PoolActivity(
            num_workers=worker_seconds / seconds if seconds > 0 else len(self._workers),
            seconds=seconds,
            busy_seconds=self._busy,
            starved_seconds=self._starved,
            blocked_seconds=self._blocked,
            num_tokens=self._tokens,
            num_sequences=self._sequences,
            queued=queued,
        )
        self._since = now
        self._busy = self._starved = self._blocked = 0.0
        self._tokens = self._sequences = 0
        return activity

    def _find(self, worker: int) -> _Worker:
        assert worker in self._workers, f"worker {worker!r} is not in the pool"
        return self._workers[worker]

    def _count(self, worker: _Worker, now: float) -> None:
        """Count the worker's time up to now."""
        span = now - worker.counted_to
        assert span >= 0, f"the clock runs backwards, by {-span} s"
        worker.counted_to = now
        if worker.num_calls > 0:
            worker.called_seconds += span
        elif self._wait is Wait.STARVED:
            worker.starved_seconds += span
        else:
            worker.blocked_seconds += span

    def _settle(self, worker: _Worker, now: float) -> None:
        """Move the worker's counted time to the pool's."""
        under_way = now - worker.call_since if worker.num_calls > 0 else 0.0
        busy = min(max(0.0, worker.balance + under_way), worker.called_seconds)
        worker.balance -= busy
        if worker.num_calls == 0:
            worker.balance = min(0.0, worker.balance)  # no call is left that it could belong to
        self._busy += busy
        self._starved += worker.starved_seconds + worker.called_seconds - busy
        self._blocked += worker.blocked_seconds
        worker.called_seconds = worker.starved_seconds = worker.blocked_seconds = 0.0


def join_stretches(first: PoolActivity, second: PoolActivity) -> PoolActivity:
    """A pool's activity over two stretches, the second after the first."""
    seconds = first.seconds + second.seconds
    worker_seconds = first.worker_seconds + second.worker_seconds
    return PoolActivity(
        num_workers=worker_seconds / seconds if seconds > 0 else second.num_workers,
        seconds=seconds,
        busy_seconds=first.busy_seconds + second.busy_seconds,
        starved_seconds=first.starved_seconds + second.starved_seconds,
        blocked_seconds=first.blocked_seconds + second.blocked_seconds,
        num_tokens=first.num_tokens + second.num_tokens,
        num_sequences=first.num_sequences + second.num_sequences,
        queued=second.queued,
    )


class RecentActivity:
    """Every pool's activity over the last stretches: one step alone says too little.

    Keeps at least num_stretches of them, where there are so many, and at least `seconds`.
    """

    def __init__(self, *, num_stretches: int = 8, seconds: float = 30.0) -> None:
        self._num_stretches, self._seconds = num_stretches, seconds
        self._kept: deque[dict[str, PoolActivity]] = deque()

    def add(self, pools: Mapping[str, PoolActivity]) -> dict[str, PoolActivity]:
        """Take the newest stretch of each pool; returns the recent ones joined."""
        self._kept.append(dict(pools))
        while len(self._kept) > self._num_stretches and self._lasts_without_oldest():
            self._kept.popleft()
        joined: dict[str, PoolActivity] = {}
        for stretch in self._kept:
            for name, activity in stretch.items():
                earlier = joined.get(name)
                joined[name] = activity if earlier is None else join_stretches(earlier, activity)
        return joined

    def _lasts_without_oldest(self) -> bool:
        stretches = list(self._kept)[1:]
        seconds = sum(max(a.seconds for a in stretch.values()) for stretch in stretches if stretch)
        return seconds >= self._seconds


def activity_metrics(pools: Mapping[str, PoolActivity]) -> dict[str, float]:
    """The metrics of each pool's activity, as docs/metrics.md names them."""
    metrics: dict[str, float] = {}
    for pool, activity in pools.items():
        metrics |= {
            f"workers/{pool}": activity.num_workers,
            f"busy_share/{pool}": activity.busy_share,
            f"starved_share/{pool}": activity.starved_share,
            f"blocked_share/{pool}": activity.blocked_share,
            f"queued/{pool}": float(activity.queued),
        }
        if activity.num_tokens > 0 and activity.busy_seconds > 0:
            metrics[f"tokens_per_second/{pool}"] = activity.num_tokens / activity.busy_seconds
    return metrics


def wire_metrics(num_bytes: Mapping[str, int], num_response_tokens: int) -> dict[str, float]:
    """Bytes that the scorers ship for each response token that the teacher reads.

    num_bytes: field of TeacherTargets -> bytes of all its arrays.  num_response_tokens: in them.
    """
    if num_response_tokens == 0:
        return {}
    return {
        f"bytes_per_teacher_token/{field}": size / num_response_tokens
        for field, size in num_bytes.items()
    }
