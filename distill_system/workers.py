"""What a room may ask of a group of workers: Ray's in cluster/, plain objects in tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from distill_system.errors import WorkerLostError

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
        """Number of places: of the members, and of lost workers that are being replaced.

        Work is dealt by places, so that a loss changes neither the parts nor what comes of them.
        """

    def start(self, worker_id: int, method: str, *arguments: Any) -> Reference:
        """Begin one call; arguments that are references are resolved where the call runs."""

    def start_with_receipt(
        self, worker_id: int, method: str, *arguments: Any
    ) -> tuple[Reference, Reference]:
        """Begin one call of a method that returns two things: a small receipt, and the result.

        Who finishes the receipt knows that the result is there, and need not fetch it; `current`
        says where.
        """

    def current(self, result: Reference) -> Reference:
        """Where a result is whose receipt was finished: the same reference, unless its worker was
        lost and the call made again. Asked once."""

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

        Raises: WorkerLostError with the worker's own traceback; DeadlineError.
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

        Raises: WorkerLostError if a worker died that nobody replaces; DeadlineError once nothing
        has come for as long as any call may take.
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
    """A group whose workers come, go and are lost while a run goes on."""

    def take_id(self) -> int:
        """The id of a worker that is to be started; no other gets it, even if it never comes."""

    def add(self, started: StartedWorker) -> None:
        """Take a worker in, under an id that `take_id` gave; into its place, if it was vacated."""

    def vacate(self, worker_id: int) -> Any:
        """End a worker that is lost, whatever it does, and keep its place for another.

        Its calls fail where they are waited for. Returns the place, for who starts the other.
        """

    def close(self, place: Any) -> None:
        """Give a place back that was vacated and will not be filled."""

    def remove(self, worker_id: int) -> None:
        """End one worker and give its place back.

        A call that is under way there fails where it is waited for: collect it before.
        """


class Peers(Protocol):
    """The other ranks of a worker that several processes make up, as its first rank calls them."""

    def start(self) -> None:
        """Start them; they load beside this rank, and end with it."""

    def call(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> list[Reference]:
        """Begin the call of every rank: rank i gets argument_tuples[i - 1]; does not wait."""

    def finish(self, references: Sequence[Reference], *, what: str, seconds: float) -> list[Any]:
        """Wait for their results; what, seconds: as Workers.finish has them.

        Raises: what a rank raised, as this worker's own; WorkerLostError; DeadlineError.
        """


class Supervision(Protocol):
    """Who replaces the lost workers of a run; see elastic.ElasticPools.

    A worker is lost if it died, cannot be reached, failed beyond use, or missed a deadline.
    """

    def lose(self, lost: WorkerLostError) -> None:
        """End this worker, if nobody has, and begin to replace it.

        Raises: `lost` itself where the pool has lost too many, or replaces none.
        """

    def notice(self) -> None:
        """Lose the workers of which Ray says by now that they are dead.  Raises: as lose does."""

    def wait_for_worker(self, pool: str) -> None:
        """Return once the pool has a worker that can be given calls.

        Raises: ResourceError, DeadlineError or what loading raised, if none comes.
        """
