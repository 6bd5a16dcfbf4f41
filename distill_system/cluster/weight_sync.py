"""How the learner reaches every rollout worker while it publishes: all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distill_system.cluster.roster import Roster
from distill_system.cluster.waiting import wait_for
from distill_system.cluster.workers import named


class EveryWorker:
    """A function that calls every worker; it travels to the learner's process with its handles.

    every_worker(method, argument_tuples): worker i gets argument_tuples[i]; returns when all are
    done.

    Raises: the first worker's error; DeadlineError.
    """

    def __init__(self, handles: Sequence[Any], *, seconds: float) -> None:
        self.handles = list(handles)
        self.seconds = seconds

    def __call__(self, method: str, argument_tuples: list[tuple[Any, ...]]) -> None:
        """Call every worker and wait for all."""
        references = [
            getattr(handle, method).remote(*arguments)
            for handle, arguments in zip(self.handles, argument_tuples, strict=True)
        ]
        roster = Roster(named("student_rollout", self.handles))
        wait_for(references, roster, what=method, seconds=self.seconds)
