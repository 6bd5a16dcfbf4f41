"""How the learner calls every rollout worker at once while it publishes weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_system.cluster.liveness import LivenessMonitor
from distill_system.cluster.waiting import wait_for
from distill_system.workers import Reference


class EveryWorker:
    """Calls one method of every worker; the object is sent to the learner's process.

    handles: name -> handle of the present workers. When workers join or leave, make a new object.
    seconds: deadline of a call that waits.
    """

    def __init__(self, handles: Mapping[str, Any], *, seconds: float) -> None:
        self.handles = dict(handles)
        self.seconds = seconds

    def start(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> list[Reference]:
        """Begin the call of every worker: worker i gets argument_tuples[i]; does not wait."""
        return [
            getattr(handle, method).remote(*arguments)
            for handle, arguments in zip(self.handles.values(), argument_tuples, strict=True)
        ]

    def __call__(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> None:
        """Call every worker and wait for all.  Raises: the first worker's error; DeadlineError."""
        references = self.start(method, argument_tuples)
        wait_for(references, LivenessMonitor(self.handles), what=method, seconds=self.seconds)
