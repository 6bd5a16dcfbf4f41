"""A group of workers in Ray processes: begins their calls, waits for results with a deadline."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from distill_system.cluster.liveness import LivenessMonitor
from distill_system.cluster.placement import Placement, release_placements
from distill_system.cluster.waiting import deadline_error, wait_any, wait_for
from distill_system.workers import Reference, StartedWorker

CALL_KEY = "deadlines.call_seconds"


class RayWorkers:
    """Workers of one class, each in its own process; implements distill_system.workers.

    handles: the first workers, which get the ids 0, 1, ...
    placements: the place of each handle.
    owns_places: whether the group returns them when it ends; those of colocated workers belong to
    the pool beside them.
    monitor: where the workers are registered, each as name-id; shared by all groups of a session,
    so that a wait of one group notices a death in another. None makes one for this group alone.
    call_seconds: longest wait without a new result.
    """

    def __init__(
        self,
        name: str,
        handles: Sequence[Any],
        placements: Sequence[Placement],
        *,
        call_seconds: float,
        owns_places: bool = True,
        monitor: LivenessMonitor | None = None,
    ) -> None:
        self.name = name
        self.call_seconds = call_seconds
        self._handles: dict[int, Any] = dict(enumerate(handles))
        self._placements: dict[int, Placement] = dict(enumerate(placements))
        self._owns_places = owns_places
        self._vacant: list[Placement] = []
        self._next_id = len(self._handles)
        self._monitor = LivenessMonitor() if monitor is None else monitor
        self._silent_seconds = 0.0
        self._monitor.add(self.named_handles())

    @property
    def members(self) -> tuple[int, ...]:
        """Ids of the workers now in the group, ascending."""
        return tuple(sorted(self._handles))

    @property
    def count(self) -> int:
        """Number of places, those of workers that are being replaced among them."""
        return len(self._handles) + len(self._vacant)

    def named_handles(self) -> dict[str, Any]:
        """The present workers, each as name-id."""
        return {f"{self.name}-{worker_id}": self._handles[worker_id] for worker_id in self.members}

    def start(self, worker_id: int, method: str, *arguments: Any) -> Reference:
        """Begin one call; arguments that are references are resolved in the worker's process."""
        return getattr(self._handles[worker_id], method).remote(*arguments)

    def start_with_receipt(
        self, worker_id: int, method: str, *arguments: Any
    ) -> tuple[Reference, Reference]:
        """Begin one call of a method that returns a receipt and a result; a reference to each."""
        call = getattr(self._handles[worker_id], method).options(num_returns=2)
        receipt, result = call.remote(*arguments)
        return receipt, result

    def current(self, result: Reference) -> Reference:
        """The reference itself: nothing of this group is made again."""
        return result

    def finish(
        self,
        references: Sequence[Reference],
        *,
        what: str,
        fetch: bool = True,
        seconds: float | None = None,
    ) -> list[Any]:
        """Wait for results of this group's calls; see wait_for.

        Raises: the worker's own DistillError; WorkerLostError with its traceback; DeadlineError.
        """
        key = CALL_KEY if seconds is None else None
        seconds = self.call_seconds if seconds is None else seconds
        return wait_for(references, self._monitor, what=what, seconds=seconds, fetch=fetch, key=key)

    def take_id(self) -> int:
        """A new worker id. Ids are never used twice, not even after a start that failed."""
        self._next_id += 1
        return self._next_id - 1

    def add(self, started: StartedWorker) -> None:
        """Add a worker that has loaded its model; its id must come from `take_id`."""
        worker_id = started.worker_id
        self._vacant = [place for place in self._vacant if not place.is_same(started.place)]
        assert worker_id < self._next_id, f"{self.name}-{worker_id}: the id was not given out"
        assert worker_id not in self._handles, f"{self.name}-{worker_id} is in the group already"
        self._handles[worker_id] = started.handle
        self._placements[worker_id] = started.place
        self._monitor.add({f"{self.name}-{worker_id}": started.handle})

    def remove(self, worker_id: int) -> None:
        """End one worker's process and return its place.

        Collect its unfinished calls first: a later wait for one of them fails with WorkerLostError.
        """
        self.close(self.vacate(worker_id))

    def vacate(self, worker_id: int) -> Placement:
        """End one worker's process, be it stopped or dead, and keep its place for another."""
        handle, place = self._handles.pop(worker_id), self._placements.pop(worker_id)
        self._monitor.remove([f"{self.name}-{worker_id}"])
        ray.kill(handle)
        self._vacant.append(place)
        return place

    def close(self, place: Placement) -> None:
        """Give a place back that was vacated and will not be filled."""
        shared = any(other.group == place.group for other in self._placements.values())
        assert not shared, f"{self.name} was placed together and keeps its size"
        self._vacant.remove(place)
        if self._owns_places:
            release_placements([place])

    def end_processes(self) -> list[Placement]:
        """End every process; returns the places, in the order of the workers, for others."""
        self.kill()
        self._placements = {at: place.again() for at, place in self._placements.items()}
        return [self._placements[at] for at in sorted(self._placements)]

    def begin_again(self, handles: Sequence[Any]) -> None:
        """Take new processes in under the ids of those that have ended, in their order."""
        assert not self._handles, "the processes before have ended"
        self._handles = dict(zip(sorted(self._placements), handles, strict=True))
        self._monitor.add(self.named_handles())

    def wait_any(
        self,
        references: Sequence[Reference],
        *,
        what: str,
        seconds: float,
        unhurried: Sequence[Reference] = (),
        together_seconds: float = 0.0,
    ) -> list[Reference]:
        """The references that are done, as soon as there is one; see cluster.waiting.wait_any.

        Raises: WorkerLostError if a worker died that nobody replaces; DeadlineError once
        consecutive waits have brought nothing for call_seconds. Time between two waits does not
        count.
        """
        began = time.monotonic()
        done = wait_any(
            references,
            self._monitor,
            what=what,
            seconds=seconds,
            unhurried=unhurried,
            together_seconds=together_seconds,
        )
        self._silent_seconds = 0.0 if done else self._silent_seconds + time.monotonic() - began
        if self._silent_seconds >= self.call_seconds:
            every, silent = [*references, *unhurried], self._silent_seconds
            raise deadline_error(
                every, every, self._monitor, what=what, seconds=silent, key=CALL_KEY
            )
        return done

    def stop(self) -> None:
        """End every process of the group and return its places."""
        self.kill()
        if self._owns_places:
            release_placements([*self._placements.values(), *self._vacant])
        self._placements, self._vacant = {}, []

    def kill(self) -> None:
        """End every process of the group; threads that wait for a result fail."""
        self._monitor.remove(self.named_handles())
        for handle in self._handles.values():
            ray.kill(handle)
        self._handles = {}


def all_named_handles(groups: Sequence[RayWorkers]) -> Mapping[str, Any]:
    """The present workers of several groups by name, in the groups' order."""
    return {name: handle for group in groups for name, handle in group.named_handles().items()}
