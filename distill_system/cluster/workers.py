"""A group of Ray-made workers: calls begin here, and every wait has a deadline and a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from distill_system.cluster.roster import Roster
from distill_system.cluster.waiting import wait_for
from distill_system.workers import Reference


class RayWorkers:
    """Workers of one class, each in its own process; implements distill_system.workers.Workers.

    roster: where the group's workers are watched over, each under name-index; by default alone.
    call_seconds: longest wait without a new result.
    """

    def __init__(
        self,
        name: str,
        handles: Sequence[Any],
        placement_groups: Sequence[PlacementGroup],
        *,
        call_seconds: float,
        roster: Roster | None = None,
    ) -> None:
        self.name = name
        self.handles = list(handles)
        self.call_seconds = call_seconds
        self._placement_groups = list(placement_groups)
        self._roster = Roster() if roster is None else roster
        self._roster.add(named(name, self.handles))

    @property
    def count(self) -> int:
        """Number of workers."""
        return len(self.handles)

    def start(self, worker: int, method: str, *arguments: Any) -> Reference:
        """Begin one call; arguments that are references are resolved where the call runs."""
        return getattr(self.handles[worker], method).remote(*arguments)

    def finish(
        self,
        references: Sequence[Reference],
        *,
        what: str,
        fetch: bool = True,
        seconds: float | None = None,
    ) -> list[Any]:
        """Wait for results of this group's calls; see wait_for.

        Raises: the worker's own DistillError; WorkerError with its traceback; DeadlineError.
        """
        seconds = self.call_seconds if seconds is None else seconds
        return wait_for(references, self._roster, what=what, seconds=seconds, fetch=fetch)

    def stop(self) -> None:
        """End every process of the group and give its resources back."""
        self.kill()
        for group in self._placement_groups:
            remove_placement_group(group)
        self._placement_groups = []

    def kill(self) -> None:
        """End every process of the group; waits for it fail with WorkerError."""
        self._roster.remove(named(self.name, self.handles))
        for handle in self.handles:
            ray.kill(handle)
        self.handles = []


def named(name: str, handles: Sequence[Any]) -> dict[str, Any]:
    """A group's workers by name: name-0, name-1, ..."""
    return {f"{name}-{index}": handle for index, handle in enumerate(handles)}
