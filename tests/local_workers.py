"""A group of plain objects behind the Workers protocol: each call runs at once, in this process.

It checks what a Ray group would need: that the worker and its method exist, and that arguments and
results survive pickling.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from distill_system.workers import StartedWorker


@dataclass(frozen=True, eq=False)
class Done:
    """A reference whose result is here already, or whose call failed; each is its own key."""

    value: Any = None
    error: Exception | None = None


class LocalWorkers:
    def __init__(self, objects):
        self.objects = dict(enumerate(objects))
        self.calls: list[tuple[int, str]] = []
        self._next_id = len(self.objects)

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(sorted(self.objects))

    @property
    def count(self) -> int:
        return len(self.objects)

    def take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def add(self, started: StartedWorker) -> None:
        assert started.worker_id < self._next_id, "the id was not given out"
        assert started.worker_id not in self.objects, "the worker is in the group already"
        self.objects[started.worker_id] = started.handle

    def remove(self, worker_id: int) -> None:
        del self.objects[worker_id]

    def start(self, worker: int, method: str, *arguments: Any) -> Done:
        assert worker in self.objects, f"there is no worker {worker}"
        self.calls.append((worker, method))
        resolved = [a.value if isinstance(a, Done) else a for a in arguments]
        travelled = pickle.loads(pickle.dumps(resolved))
        try:
            result = getattr(self.objects[worker], method)(*travelled)
        except Exception as error:
            return Done(error=error)
        return Done(value=pickle.loads(pickle.dumps(result)))

    def finish(self, references, *, what: str, fetch: bool = True, seconds=None) -> list[Any]:
        assert what, "a wait must say what it waits for"
        for reference in references:
            if reference.error is not None:
                raise reference.error
        return [reference.value for reference in references] if fetch else []

    def wait_any(
        self, references, *, what: str, seconds: float, unhurried=(), together_seconds: float = 0.0
    ):
        assert what, "a wait must say what it waits for"
        assert seconds >= 0
        assert together_seconds >= 0
        return [*references, *unhurried]
