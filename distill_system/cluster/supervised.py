"""Calls that survive their worker: made again on another, under the reference that they began with.

A worker is lost if it died, cannot be reached, failed beyond use, or missed a deadline. Whoever
supervises the pool ends it and starts another in its place. What it had under way is computed anew
elsewhere, the same, since it follows from its arguments and the weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distill_system.errors import (
    DeadlineError,
    DistillError,
    NonFiniteError,
    RepeatedLossError,
    WorkerLostError,
)
from distill_system.workers import ElasticWorkers, Reference, Supervision

MOST_LOSSES = 2
"""A call that has lost so many workers is not made again: it may be what kills them."""


@dataclass(slots=True)
class _Call:
    """One call under way, wherever it is made now.

    references: of this attempt; the first is finished, a second is the result of a receipt.
    result: the caller's reference to the result of a receipt.
    losses: workers that were lost with it.  is_moved: whether it was made again.
    fatal: why it is not made again any more.
    """

    method: str
    arguments: tuple[Any, ...]
    worker: int
    references: tuple[Reference, ...]
    result: Reference | None = None
    losses: int = 0
    is_moved: bool = False
    fatal: DistillError | None = None


class SupervisedWorkers:
    """Implements Workers over a group whose lost workers are replaced.

    For calls that are pure: a slice of decoding, which an engine's state takes part in, is the
    group's own business.

    supervision: None, as where no run goes on that could wait, leaves losses to the caller.
    """

    def __init__(self, pool: str, group: ElasticWorkers) -> None:
        self.pool = pool
        self.group = group
        self.supervision: Supervision | None = None
        # By the reference that the caller holds.
        self._calls: dict[Reference, _Call] = {}
        self._moved: dict[Reference, Reference] = {}

    @property
    def members(self) -> tuple[int, ...]:
        """See Workers; waits where every worker is lost. A pool without places has no workers."""
        if not self.group.members and self.group.count and self.supervision is not None:
            self.supervision.wait_for_worker(self.pool)
        return self.group.members

    @property
    def count(self) -> int:
        """See Workers."""
        return self.group.count

    def start(self, worker_id: int, method: str, *arguments: Any) -> Reference:
        """See Workers."""
        reference = self.group.start(worker_id, method, *arguments)
        self._calls[reference] = _Call(method, arguments, worker_id, (reference,))
        return reference

    def start_with_receipt(
        self, worker_id: int, method: str, *arguments: Any
    ) -> tuple[Reference, Reference]:
        """See Workers."""
        receipt, result = self.group.start_with_receipt(worker_id, method, *arguments)
        self._calls[receipt] = _Call(method, arguments, worker_id, (receipt, result), result)
        return receipt, result

    def finish(
        self,
        references: Sequence[Reference],
        *,
        what: str,
        fetch: bool = True,
        seconds: float | None = None,
    ) -> list[Any]:
        """See Workers; a call that failed with its worker is made again, and waited for.

        So is one whose result is not finite, on another worker: the first one's memory may be bad.

        Raises: RepeatedLossError for one that has lost MOST_LOSSES workers; NonFiniteError where
            that is what cost them.
        """
        while True:
            self._raise_fatal(references)
            now = [self._now(reference) for reference in references]
            try:
                results = self.group.finish(now, what=what, fetch=fetch, seconds=seconds)
            except (WorkerLostError, DeadlineError, NonFiniteError) as error:
                self._recover(error)
            else:
                self._end(references)
                return results

    def current(self, result: Reference) -> Reference:
        """See Workers."""
        return self._moved.pop(result, result)

    def forget_all(self) -> None:
        """Nobody waits any more for what is under way."""
        self._calls.clear()
        self._moved.clear()

    def wait_any(
        self,
        references: Sequence[Reference],
        *,
        what: str,
        seconds: float,
        unhurried: Sequence[Reference] = (),
        together_seconds: float = 0.0,
    ) -> list[Reference]:
        """See Workers; a call whose worker is lost counts as done, and finish makes it again."""
        return self.group.wait_any(
            references,
            what=what,
            seconds=seconds,
            unhurried=unhurried,
            together_seconds=together_seconds,
        )

    def _end(self, references: Sequence[Reference]) -> None:
        """These calls are over: their arguments need not be kept for another attempt."""
        for reference in references:
            call = self._calls.pop(reference, None)
            if call is not None and call.result is not None and call.is_moved:
                self._moved[call.result] = call.references[1]

    def _now(self, reference: Reference) -> Reference:
        """The present attempt of what this reference began."""
        call = self._calls.get(reference)
        return reference if call is None else call.references[0]

    def _recover(self, error: WorkerLostError | DeadlineError | NonFiniteError) -> None:
        found = _losses(error)
        if self.supervision is None or not found or any(lost.pool != self.pool for lost in found):
            raise error
        for lost in found:
            self.supervision.lose(lost)
        blamed: set[int] = set()
        for began, call in list(self._calls.items()):
            if call.worker in self.group.members or call.fatal is not None:
                continue
            # A worker makes its calls in their order: the first that has not ended well is the one
            # that it was lost with. Those behind it are made again without blame.
            if call.worker not in blamed and not self._has_ended_well(call):
                blamed.add(call.worker)
                self._blame(began, call, error)
            if call.fatal is None:
                self._make_again(call)

    def _has_ended_well(self, call: _Call) -> bool:
        try:
            self.group.finish(call.references[:1], what="a call of a lost worker")
        except DistillError:
            return False
        return True

    def _blame(self, began: Reference, call: _Call, error: DistillError) -> None:
        """Count a loss to a call; at the last, whoever waits for it is to hear of it."""
        call.losses += 1
        if call.losses < MOST_LOSSES:
            return
        if isinstance(error, NonFiniteError):
            call.fatal = error
            return
        call.fatal = RepeatedLossError(
            f"{call.method} has lost {call.losses} workers, the last of them so: {error}",
            error.worker,
            call=began,
        )
        call.fatal.__cause__ = error

    def _raise_fatal(self, references: Sequence[Reference]) -> None:
        """Raise what has come of a call among these that is not made again any more."""
        for reference in references:
            call = self._calls.get(reference)
            if call is not None and call.fatal is not None:
                del self._calls[reference]
                raise call.fatal

    def _make_again(self, call: _Call) -> None:
        members = self.members
        # By what is under way there, so that one worker's calls go to all that are left.
        loads = [sum(each.worker == member for each in self._calls.values()) for member in members]
        call.worker = members[loads.index(min(loads))]
        call.is_moved = True
        if len(call.references) > 1:
            start = self.group.start_with_receipt
            call.references = start(call.worker, call.method, *call.arguments)
        else:
            call.references = (self.group.start(call.worker, call.method, *call.arguments),)


def _losses(error: WorkerLostError | DeadlineError | NonFiniteError) -> list[WorkerLostError]:
    """The workers that are lost by this error: one that died or is broken, or all that are late."""
    if isinstance(error, WorkerLostError):
        return [error]
    if isinstance(error, NonFiniteError):
        return [WorkerLostError(str(error), error.worker)]
    return [WorkerLostError(f"{name} hangs: {error}", name) for name in error.late]
