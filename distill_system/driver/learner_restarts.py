"""A lost rank of the learner: all ranks start anew in the same run, from the newest checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable

from distill_system.elastic import ReplacementBudget
from distill_system.errors import DeadlineError, NonFiniteError, WorkerLostError
from distill_system.observe import FaultLog
from distill_system.run.context import RunContext

MOST_AT_ONE_STEP = 3
"""A learner that is lost so often after the same step does not get past it: the run ends."""

Loss = WorkerLostError | DeadlineError | NonFiniteError
"""What a lost rank shows itself by; a number that is not finite may be a fault of its memory, and
is computed once more."""


class LearnerRestarts:
    """Counts a learner's losses and starts its ranks anew.

    One rank cannot be replaced alone: its share of the weights and of the optimizer is gone with
    it. The steps since the checkpoint are made again.

    name: of the ranks' pool.  start_anew: ends and starts all ranks; see run.restart_learner.
    """

    def __init__(
        self, context: RunContext, name: str, faults: FaultLog, start_anew: Callable[[], None]
    ) -> None:
        self._context = context
        self._name = name
        self._faults = faults
        self._start_anew = start_anew
        self._budget = ReplacementBudget(name, context.config.faults)
        self._steps: list[int] = []
        self._lost: WorkerLostError | None = None
        self._since = 0.0

    def lose(self, error: Loss) -> None:
        """A rank is lost, by this error.

        Raises: `error` if it is of another worker, if the ranks are not started anew any more, or
            as the run ends.
        """
        lost = self._find_rank(error)
        if lost is None or self._context.stop.is_made:
            raise error
        if self._lost is None:
            self._since = time.monotonic()
        self._lost = lost
        self._faults.lose(lost.worker, str(lost))
        try:
            self._budget.spend(lost)
        except WorkerLostError as spent:
            raise (error if isinstance(error, NonFiniteError) else spent) from None
        self._steps.append(self._faults.step)
        most = 2 if isinstance(error, NonFiniteError) else MOST_AT_ONE_STEP
        if self._steps[-most:] == [self._faults.step] * most:
            raise error
        self._context.view.note(
            f"{lost.brief}; all ranks start anew from the newest checkpoint, and the run goes on"
        )

    def restart(self) -> None:
        """Start all ranks anew; one that is lost meanwhile begins it again.

        Raises: as `lose` does; ResourceError; what a rank raised while loading.
        """
        while True:
            try:
                return self._start_anew()
            except (WorkerLostError, DeadlineError) as error:
                self.lose(error)  # or raises it

    def goes_on_after(self, first: int) -> None:
        """The run goes on after so many steps; told if the learner was lost before."""
        if self._lost is not None:
            seconds, again = time.monotonic() - self._since, self._faults.step - first
            self._faults.restart(self._lost.worker, seconds, first=first)
            self._context.view.note(
                f"{self._name} has started anew, after {seconds:.1f} s; {again} steps are made "
                "again"
            )
            self._lost = None
        self._faults.step = first

    def _find_rank(self, error: Loss) -> WorkerLostError | None:
        """The rank that an error tells of; None if it tells of another worker."""
        if isinstance(error, DeadlineError):
            late = [name for name in error.late if name.rpartition("-")[0] == self._name]
            return WorkerLostError(f"{late[0]} hangs: {error}", late[0]) if late else None
        if error.pool != self._name:
            return None
        if isinstance(error, WorkerLostError):
            return error
        return WorkerLostError(str(error), error.worker)
