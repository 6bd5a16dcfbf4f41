"""A lost rank of the learner: all ranks start anew in the same run, from the newest checkpoint."""

from __future__ import annotations

import time

from distill_system.elastic import ReplacementBudget
from distill_system.errors import DeadlineError, WorkerLostError
from distill_system.observe import FaultLog
from distill_system.run.context import RunContext
from distill_system.run.pools import Pools, restart_learner

LEARNER = "learner"

MOST_AT_ONE_STEP = 3
"""A learner that is lost so often after the same step does not get past it: the run ends."""


class LearnerRestarts:
    """Counts the learner's losses and starts its ranks anew.

    One rank cannot be replaced alone: its share of the weights and of the optimizer is gone with
    it. The steps since the checkpoint are made again.
    """

    def __init__(self, context: RunContext, pools: Pools, faults: FaultLog) -> None:
        self._context = context
        self._pools = pools
        self._faults = faults
        self._budget = ReplacementBudget(LEARNER, context.config.faults)
        self._steps: list[int] = []
        self._lost: WorkerLostError | None = None
        self._since = 0.0

    def lose(self, error: WorkerLostError | DeadlineError) -> None:
        """A rank is lost, by this error.

        Raises: `error` if it is of another worker, or if the ranks are not started anew any more.
        """
        lost = _find_rank(error)
        if lost is None:
            raise error
        if self._lost is None:
            self._since = time.monotonic()
        self._lost = lost
        self._faults.lose(lost.worker, str(lost))
        self._budget.spend(lost)
        self._steps.append(self._faults.step)
        if self._steps[-MOST_AT_ONE_STEP:] == [self._faults.step] * MOST_AT_ONE_STEP:
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
                return restart_learner(self._context, self._pools)
            except (WorkerLostError, DeadlineError) as error:
                self.lose(error)

    def goes_on_after(self, first: int) -> None:
        """The run goes on after so many steps; told if the learner was lost before."""
        if self._lost is not None:
            seconds, again = time.monotonic() - self._since, self._faults.step - first
            self._faults.restart(self._lost.worker, seconds, first=first)
            self._context.view.note(
                f"the learner has started anew, after {seconds:.1f} s; {again} steps are made again"
            )
            self._lost = None


def _find_rank(error: WorkerLostError | DeadlineError) -> WorkerLostError | None:
    """The rank that an error tells of; None if it tells of another worker."""
    if isinstance(error, WorkerLostError):
        return error if error.pool == LEARNER else None
    late = [name for name in error.late if name.rpartition("-")[0] == LEARNER]
    return WorkerLostError(f"{late[0]} hangs: {error}", late[0]) if late else None
