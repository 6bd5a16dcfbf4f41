"""What a room may ask of a group of workers: Ray's in cluster/, plain objects in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Reference = Any
"""A result that may not exist yet. It may be handed to another worker's call without being read."""


class Workers(Protocol):
    """A fixed group of workers of one class."""

    @property
    def count(self) -> int:
        """Number of workers."""

    def start(self, worker: int, method: str, *arguments: Any) -> Reference:
        """Begin one call; arguments that are references are resolved where the call runs."""

    def finish(
        self, references: Sequence[Reference], *, what: str, fetch: bool = True
    ) -> list[Any]:
        """Wait for results; `what` names the wait in a deadline's message.

        fetch=False waits without bringing the results here, and returns nothing.

        Raises: WorkerError with the worker's own traceback; DeadlineError.
        """
