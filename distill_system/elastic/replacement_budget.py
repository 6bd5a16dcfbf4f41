"""How many lost workers of a pool are replaced before the run ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from distill_system.config.pools import FaultsConfig
from distill_system.errors import WorkerLostError


class ReplacementBudget:
    """faults.max_replacements within faults.within_seconds, of one pool.

    clock: seconds that never run backwards.
    """

    def __init__(
        self, pool: str, faults: FaultsConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool = pool
        self._faults = faults
        self._clock = clock
        self._lost_at: deque[float] = deque()

    def spend(self, lost: WorkerLostError) -> None:
        """One more is lost.

        Raises: WorkerLostError with what that one died of, if it is one too many.
        """
        now, within = self._clock(), self._faults.within_seconds
        self._lost_at.append(now)
        while self._lost_at[0] < now - within:
            self._lost_at.popleft()
        count, most = len(self._lost_at), self._faults.max_replacements
        if most == 0:
            raise lost
        if count > most:
            raise WorkerLostError(
                f"{lost}. {self._pool} has lost {count} of its workers within {within:g} s; "
                f"faults.max_replacements={most} of them are replaced",
                lost.worker,
            )
