"""A vLLM engine that gives its GPU's memory free while it has nothing to write."""

from __future__ import annotations

from typing import Any


class IdleSleep:
    """Wakes an engine before it is given work, and puts it to sleep when all is done.

    engine: vllm's LLMEngine.  is_on: it was built with enable_sleep_mode; else nothing happens.
    Asleep, the weights are in CPU memory and the cache is dropped (vLLM's level 1). What computes
    on the same GPU must have left enough of it free when the engine wakes.
    """

    def __init__(self, engine: Any, *, is_on: bool) -> None:
        self._engine = engine
        self._is_on = is_on
        self._is_asleep = False

    def wake(self) -> None:
        """Bring the weights back if need be; returns when they are there."""
        if self._is_asleep:
            self._engine.wake_up()
            self._is_asleep = False

    def rest(self) -> None:
        """Sleep, unless there is work left."""
        if self._is_on and not self._is_asleep and not self._engine.has_unfinished_requests():
            self._engine.sleep(level=1)
            self._is_asleep = True
