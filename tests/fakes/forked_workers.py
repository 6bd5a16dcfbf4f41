"""A group of workers, each in a process of its own, behind the Workers protocol: for real ranks.

Processes are forked, so that they start in a moment and may be made by any function.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from fakes.interfaces import require_call

DEADLINE_SECONDS = 120


@dataclass(frozen=True)
class Call:
    """A reference: the number of a worker's call."""

    worker: int
    number: int


class ForkedWorkers:
    """Implements Workers; makers[i]() makes worker i, in its own process.

    A method may also be a module's function, which is given the worker.
    """

    def __init__(self, makers: Sequence[Callable[[], Any]]) -> None:
        context = multiprocessing.get_context("fork")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        self.sent = [0] * len(makers)
        self.replies: dict[Call, tuple[Any, Exception | None]] = {}
        self._fetched: set[Call] = set()
        for maker in makers:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(maker, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(range(len(self.pipes)))

    @property
    def count(self) -> int:
        return len(self.pipes)

    def start(self, worker_id: int, method: str | Callable[..., Any], *arguments: Any) -> Call:
        assert worker_id in self.members, f"there is no worker {worker_id}"
        resolved = [getattr(argument, "value", argument) for argument in arguments]
        self.pipes[worker_id].send((method, resolved))
        self.sent[worker_id] += 1
        return Call(worker_id, self.sent[worker_id])

    def start_with_receipt(self, worker_id: int, method: str, *arguments: Any) -> tuple[Call, Call]:
        raise AssertionError("no rank has a method that gives receipts")

    def current(self, result: Call) -> Call:
        assert isinstance(result, Call), f"expected a call of this group, got {result!r}"
        return result

    def ask(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a module's function says of every worker."""
        calls = [self.start(worker, function, *arguments) for worker in self.members]
        return self.finish(calls, what="answers")

    def finish(
        self,
        references: Sequence[Call],
        *,
        what: str,
        fetch: bool = True,
        seconds: float | None = None,
    ) -> list[Any]:
        self._require_begun(references, what)
        while missing := [call for call in references if not self._is_done(call)]:
            limit = DEADLINE_SECONDS if seconds is None else seconds
            assert self._receive(missing, limit), f"{what}: no rank answered within {limit} s"
            self._raise_first_failure(references if fetch else ())
        return [self._fetch(call, what) for call in references] if fetch else []

    def wait_any(
        self,
        references: Sequence[Call],
        *,
        what: str,
        seconds: float,
        unhurried: Sequence[Call] = (),
        together_seconds: float = 0.0,
    ) -> list[Call]:
        every = [*references, *unhurried]
        self._require_begun(every, what)
        if not any(self._is_done(call) for call in every):
            self._receive(every, seconds)
        return [call for call in every if self._is_done(call)]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _is_done(self, call: Call) -> bool:
        return call in self.replies or call in self._fetched

    def _receive(self, calls: Sequence[Call], seconds: float) -> bool:
        """Take in what these calls' workers have said; whether any said something in time."""
        workers = sorted({call.worker for call in calls})
        ready = multiprocessing.connection.wait([self.pipes[at] for at in workers], seconds)
        for worker in (at for at in workers if self.pipes[at] in ready):
            number, reply, failure = self.pipes[worker].recv()
            self.replies[Call(worker, number)] = (reply, failure)
        return bool(ready)

    def _require_begun(self, references: Sequence[Call], what: str) -> None:
        assert what, "a wait must say what it waits for"
        for call in references:
            begun = isinstance(call, Call) and call.number <= self.sent[call.worker]
            assert begun, f"{what}: expected a call of this group, got {call!r}"

    def _raise_first_failure(self, calls: Sequence[Call]) -> None:
        """As soon as it is known: the other ranks may wait for the failed one for ever."""
        for call in calls:
            _, failure = self.replies.get(call, (None, None))
            if failure is not None:
                raise failure

    def _fetch(self, call: Call, what: str) -> Any:
        assert call not in self._fetched, f"{what}: the result was fetched before"
        self._fetched.add(call)
        reply, failure = self.replies.pop(call)
        if failure is not None:
            raise failure
        return reply


class ForkedPeers:
    """Implements Peers: the other ranks of a worker whose first rank is this process."""

    def __init__(self, makers: Sequence[Callable[[], Any]]) -> None:
        self._makers = makers
        self._workers: ForkedWorkers | None = None

    def start(self) -> None:
        self._workers = ForkedWorkers(self._makers)

    def call(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> list[Call]:
        assert self._workers is not None, "they are started before they are called"
        pairs = zip(self._workers.members, argument_tuples, strict=True)
        return [self._workers.start(at, method, *arguments) for at, arguments in pairs]

    def finish(self, references: Sequence[Call], *, what: str, seconds: float) -> list[Any]:
        assert self._workers is not None, "they are started before they are called"
        return self._workers.finish(references, what=what, seconds=min(seconds, DEADLINE_SECONDS))

    def stop(self) -> None:
        if self._workers is not None:
            self._workers.stop()


def _serve(maker: Callable[[], Any], pipe: Connection) -> None:
    gc.freeze()  # what the other process has left to collect may wait for threads that stay there
    worker, number = None, 0
    while True:
        method, arguments = pipe.recv()
        number += 1
        try:
            worker = worker or maker()
            pipe.send((number, _call(worker, method, arguments), None))
        except Exception as failure:
            failure.add_note(traceback.format_exc())
            pipe.send((number, None, failure))


def _call(worker: Any, method: str | Callable[..., Any], arguments: Sequence[Any]) -> Any:
    if not isinstance(method, str):
        return method(worker, *arguments)
    require_call(type(worker), method, arguments)
    return getattr(worker, method)(*arguments)
