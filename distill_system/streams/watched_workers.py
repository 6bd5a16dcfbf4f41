"""A group of workers whose calls are counted on its pool's clock, in both modes alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from distill_system.observe import PoolClock, Wait
from distill_system.records import PoolActivity
from distill_system.workers import Reference, Workers


class WatchedWorkers:
    """Behind the Workers protocol: what stands before it cannot tell it from the group itself.

    A call counts from `start` until `end` or `finish` hears of it, so whoever waits by other means
    (wait_any of another group) says what has ended.

    clock: seconds that never run backwards.
    """

    def __init__(self, workers: Workers, clock: Callable[[], float]) -> None:
        self._workers = workers
        self._clock = clock
        self._activity = PoolClock(workers.members, clock())
        # Each with its worker and when it began.
        self._calls: dict[Reference, tuple[int, float]] = {}

    @property
    def members(self) -> tuple[int, ...]:
        """See Workers."""
        return self._workers.members

    @property
    def count(self) -> int:
        """See Workers."""
        return self._workers.count

    @property
    def present(self) -> frozenset[int]:
        """Workers whose time is counted."""
        return self._activity.workers

    @property
    def calls(self) -> list[Reference]:
        """Calls under way, in the order in which they began."""
        return list(self._calls)

    def start(self, worker_id: int, method: str, *arguments: Any) -> Reference:
        """See Workers."""
        reference = self._workers.start(worker_id, method, *arguments)
        self._begin(reference, worker_id)
        return reference

    def start_with_receipt(
        self, worker_id: int, method: str, *arguments: Any
    ) -> tuple[Reference, Reference]:
        """See Workers; the call ends with its receipt."""
        receipt, result = self._workers.start_with_receipt(worker_id, method, *arguments)
        self._begin(receipt, worker_id)
        return receipt, result

    def current(self, result: Reference) -> Reference:
        """See Workers."""
        return self._workers.current(result)

    def finish(
        self,
        references: Sequence[Reference],
        *,
        what: str,
        fetch: bool = True,
        seconds: float | None = None,
        busy_seconds: Callable[[Any], float] | None = None,
    ) -> list[Any]:
        """See Workers.

        busy_seconds: of a result, what its worker measured; None counts whole calls as work.
        """
        results = self._workers.finish(references, what=what, fetch=fetch, seconds=seconds)
        if busy_seconds is None:
            self.end(references)
        else:
            for reference, result in zip(references, results, strict=True):
                self._end(reference, busy_seconds(result))
        return results

    def wait_any(
        self,
        references: Sequence[Reference],
        *,
        what: str,
        seconds: float,
        unhurried: Sequence[Reference] = (),
        together_seconds: float = 0.0,
    ) -> list[Reference]:
        """See Workers."""
        return self._workers.wait_any(
            references,
            what=what,
            seconds=seconds,
            unhurried=unhurried,
            together_seconds=together_seconds,
        )

    def find_overdue(self, seconds: float) -> list[int]:
        """Workers of which a call is under way for longer than this."""
        since = self._clock() - seconds
        return sorted({worker for worker, began in self._calls.values() if began < since})

    def end(self, references: Iterable[Reference]) -> None:
        """Those of these calls that are this group's, and still counted, have ended."""
        for reference in references:
            self._end(reference, None)

    def join(self, worker_id: int) -> None:
        """A worker belongs to the pool from now on, idle."""
        self._activity.join(worker_id, self._clock())

    def leave(self, worker_id: int) -> None:
        """A worker is gone, and with it the calls that it had under way."""
        self._activity.leave(worker_id, self._clock())
        self._calls = {call: at for call, at in self._calls.items() if at[0] != worker_id}

    def wait_for(self, reason: Wait) -> None:
        """From now on, workers without a call are idle for this reason."""
        self._activity.waits(reason, self._clock())

    def hand_on(self, *, num_tokens: int, num_sequences: int) -> None:
        """Count what the pool has finished."""
        self._activity.hand_on(num_tokens=num_tokens, num_sequences=num_sequences)

    def pop_activity(self, *, queued: int = 0) -> PoolActivity:
        """What the pool did since this was last asked."""
        return self._activity.pop(self._clock(), queued=queued)

    def _begin(self, reference: Reference, worker_id: int) -> None:
        now = self._clock()
        self._activity.begin(worker_id, now)
        self._calls[reference] = (worker_id, now)

    def _end(self, reference: Reference, busy_seconds: float | None) -> None:
        if reference in self._calls:
            worker, _ = self._calls.pop(reference)
            self._activity.end(worker, self._clock(), busy_seconds=busy_seconds)
