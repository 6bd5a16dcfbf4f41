"""How the learner reaches every rollout worker while it publishes: all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill_system.cluster.liveness import LivenessMonitor
from distill_system.cluster.waiting import wait_for
from distill_system.workers import Reference


class EveryWorker:
    """Calls every worker; it travels to the learner's process with its handles.

    every_worker(method, argument_tuples): the i-th worker gets argument_tuples[i]; returns when all
    are done.
    handles: by name, of the workers that there are now. One that comes or goes later takes a new
    object.

    Raises: the first worker's error; DeadlineError.
    """

    def __init__(self, handles: Mapping[str, Any], *, seconds: float) -> None:
        self.handles = dict(handles)
        self.seconds = seconds

    def start(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> list[Reference]:
        """Call every worker, and wait for none."""
        return [
            getattr(handle, method).remote(*arguments)
            for handle, arguments in zip(self.handles.values(), argument_tuples, strict=True)
        ]

    def __call__(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> None:
        """Call every worker and wait for all."""
        references = self.start(method, argument_tuples)
        wait_for(references, LivenessMonitor(self.handles), what=method, seconds=self.seconds)
