"""A group of plain objects behind the Workers protocol: each call runs at once, in this process.

It checks what a Ray group would need: that the worker and its method exist, and that arguments and
results survive pickling.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Done:
    """A reference whose result is here already, or whose call failed."""

    value: Any = None
    error: Exception | None = None


class LocalWorkers:
    def __init__(self, objects):
        self.objects = list(objects)
        self.calls: list[tuple[int, str]] = []

    @property
    def count(self) -> int:
        return len(self.objects)

    def start(self, worker: int, method: str, *arguments: Any) -> Done:
        assert 0 <= worker < self.count, f"there is no worker {worker}"
        self.calls.append((worker, method))
        resolved = [a.value if isinstance(a, Done) else a for a in arguments]
        travelled = pickle.loads(pickle.dumps(resolved))
        try:
            result = getattr(self.objects[worker], method)(*travelled)
        except Exception as error:
            return Done(error=error)
        return Done(value=pickle.loads(pickle.dumps(result)))

    def finish(self, references, *, what: str, fetch: bool = True) -> list[Any]:
        assert what, "a wait must say what it waits for"
        for reference in references:
            if reference.error is not None:
                raise reference.error
        return [reference.value for reference in references] if fetch else []
