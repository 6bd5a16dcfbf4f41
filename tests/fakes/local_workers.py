"""A group of plain objects behind the ElasticWorkers protocol: each call runs at once, in here.

It checks what a Ray group would need: that the worker, its method and the arguments fit, that what
travels survives pickling, that references are of this group's calls, and that nobody fetches a
result a second time.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distill_system.errors import DistillError
from distill_system.workers import StartedWorker
from fakes.interfaces import require_call


@dataclass(frozen=True, eq=False)
class Done:
    """A reference whose result is here already, or whose call failed.

    Made by hand it is of a call elsewhere, such as those that a learner's rank hands on.
    """

    value: Any = None
    error: Exception | None = None


class Call(Done):
    """A reference to a call that a group began."""


class LocalWorkers:
    """Implements ElasticWorkers.

    stands_for: the class whose methods may be called, where the objects only stand for it; by
    default each object's own.
    calls: of every call the worker's id and the method, in their order.
    """

    def __init__(self, objects: Sequence[Any], *, stands_for: type | None = None) -> None:
        self.objects: dict[int, Any] = dict(enumerate(objects))
        self.stands_for = stands_for
        self.calls: list[tuple[int, str]] = []
        # Told of the worker as a call begins; what it raises is what the call fails with.
        self.may_fetch_again = False  # as who looks what a lost worker had ended well
        self.before_each_call: Callable[[int], None] = lambda worker_id: None
        self._next_id = len(self.objects)
        self._num_vacant = 0
        self._begun: set[Done] = set()
        self._fetched: set[Done] = set()

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(sorted(self.objects))

    @property
    def count(self) -> int:
        return len(self.objects) + self._num_vacant

    def take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def add(self, started: StartedWorker) -> None:
        assert started.worker_id < self._next_id, "the id was not given out"
        assert started.worker_id not in self.objects, "the worker is in the group already"
        self.objects[started.worker_id] = started.handle
        if started.place is not None:
            self.close(started.place)

    def vacate(self, worker_id: int) -> str:
        self.remove(worker_id)
        self._num_vacant += 1
        return f"place of {worker_id}"

    def close(self, place: str) -> None:
        assert self._num_vacant > 0, f"{place} is filled, or was given back"
        self._num_vacant -= 1

    def remove(self, worker_id: int) -> None:
        assert worker_id in self.objects, f"there is no worker {worker_id}"
        del self.objects[worker_id]

    def start(self, worker_id: int, method: str, *arguments: Any) -> Call:
        assert worker_id in self.objects, f"there is no worker {worker_id}"
        worker = self.objects[worker_id]
        require_call(self.stands_for or type(worker), method, arguments)
        self.calls.append((worker_id, method))
        try:
            self.before_each_call(worker_id)
        except DistillError as error:
            call = Call(error=error)
        else:
            call = _run(getattr(worker, method), arguments)
        self._begun.add(call)
        return call

    def start_with_receipt(self, worker_id: int, method: str, *arguments: Any) -> tuple[Call, Call]:
        both = LocalWorkers.start(self, worker_id, method, *arguments)
        if both.error is not None:
            parts = Call(error=both.error), Call(error=both.error)
        else:
            receipt, result = both.value
            parts = Call(value=receipt), Call(value=result)
        self._begun.update(parts)
        return parts

    def current(self, result: Call) -> Call:
        assert result in self._begun, "the call is another group's"
        return result

    def finish(
        self,
        references: Sequence[Any],
        *,
        what: str,
        fetch: bool = True,
        seconds: float | None = None,
    ) -> list[Any]:
        _check_wait(references, what=what, seconds=seconds)
        if not fetch:
            return []  # a failed call counts as done; whoever is handed its result fails
        results = [self._look(reference, what) for reference in references]
        assert len({*references}) == len(references), f"{what}: a result is asked for twice"
        self._fetched.update(references)  # one failure fetches none: the others can be asked again
        return results

    def wait_any(
        self,
        references: Sequence[Any],
        *,
        what: str,
        seconds: float,
        unhurried: Sequence[Any] = (),
        together_seconds: float = 0.0,
    ) -> list[Any]:
        _check_wait([*references, *unhurried], what=what, seconds=seconds)
        assert together_seconds >= 0
        return [*references, *unhurried]

    def _look(self, reference: Done, what: str) -> Any:
        is_ours = reference in self._begun or not isinstance(reference, Call)
        assert is_ours, f"{what}: the call is another group's"
        is_new = self.may_fetch_again or reference not in self._fetched
        assert is_new, f"{what}: the result was fetched before"
        if reference.error is not None:
            raise reference.error
        return reference.value


def _run(method: Any, arguments: Sequence[Any]) -> Call:
    for argument in arguments:
        if isinstance(argument, Done) and argument.error is not None:
            return Call(error=argument.error)
    resolved = [a.value if isinstance(a, Done) else a for a in arguments]
    try:
        result = method(*pickle.loads(pickle.dumps(resolved)))
    except Exception as error:
        return Call(error=error)
    return Call(value=pickle.loads(pickle.dumps(result)))


def _check_wait(references: Sequence[Any], *, what: str, seconds: float | None) -> None:
    assert what, "a wait must say what it waits for"
    assert seconds is None or seconds >= 0, f"{what}: {seconds} s are no time to wait for"
    for reference in references:
        assert isinstance(reference, Done), f"{what}: expected a reference, got {reference!r}"
