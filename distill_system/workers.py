"""What a room may ask of a group of workers: Ray's in cluster/, plain objects in tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

Reference = Any
"""A result that may not exist yet. It may be handed to another worker's call without being read."""


@runtime_checkable
class Workers(Protocol):
    """A group of workers of one class."""

    @property
    def members(self) -> tuple[int, ...]:
        """Ids of the workers now in the group, ascending; 0, 1, ... where it keeps its size.

        A run never gives an id twice.
        """

    @property
    def count(self) -> int:
        """Number of workers."""

    def start(self, worker_id: int, method: str, *arguments: Any) -> Reference:
        """Begin one call; arguments that are references are resolved where the call runs."""

    def finish(
        self,
        references: Sequence[Reference],
        *,
        what: str,
        fetch: bool = True,
        seconds: float | None = None,
    ) -> list[Any]:
        """Wait for results; `what` names the wait in a deadline's message.

        fetch=False waits without bringing the results here, and returns nothing.
        seconds: longest wait without a new result; None: as long as any call may take.

        Raises: WorkerError with the worker's own traceback; DeadlineError.
        """

    def wait_any(
        self,
        references: Sequence[Reference],
        *,
        what: str,
        seconds: float,
        unhurried: Sequence[Reference] = (),
        together_seconds: float = 0.0,
    ) -> list[Reference]:
        """Those that are done, failed ones among them, as soon as there is one; none after so long.

        unhurried: waited for too; where they are many, they may be heard of together, up to
        together_seconds late. All may be other groups' references too.

        Raises: WorkerError if a worker died; DeadlineError once nothing has come for as long as any
        call may take.
        """


@dataclass(frozen=True, slots=True)
class StartedWorker:
    """A worker that has loaded its model and is in no group yet.

    handle, place: what the group that takes it in calls, and what it gives back.
    """

    worker_id: int
    handle: Any
    place: Any


class ElasticWorkers(Workers, Protocol):
    """A group whose workers come and go while a run goes on."""

    def take_id(self) -> int:
        """The id of a worker that is to be started; no other gets it, even if it never comes."""

    def add(self, started: StartedWorker) -> None:
        """Take a worker in, under an id that `take_id` gave."""

    def remove(self, worker_id: int) -> None:
        """End one worker and give its place back.

        A call that is under way there fails where it is waited for: collect it before.
        """
