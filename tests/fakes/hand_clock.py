"""A clock that a test moves, so that no bound in a test is one of the machine's speed."""

from __future__ import annotations

from collections.abc import Callable


class HandClock:
    """Stands for time.perf_counter and time.monotonic when called, and for time.sleep.

    on_sleep: what happens elsewhere while somebody sleeps.
    """

    def __init__(self, on_sleep: Callable[[], object] = lambda: None) -> None:
        self.now = 1000.0
        self.on_sleep = on_sleep

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0, "nobody sleeps for nothing"
        self.now += seconds
        self.on_sleep()
