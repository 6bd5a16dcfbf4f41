"""A group of workers, each in a process of its own, behind the Workers protocol: for real ranks.

Processes are forked, so that they start in a moment and may be made by any function.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import traceback
from dataclasses import dataclass

DEADLINE_SECONDS = 120


@dataclass(frozen=True)
class Call:
    """A reference: the number of a worker's call."""

    worker: int
    number: int


class ForkedWorkers:
    """makers[i]() makes worker i, in its own process."""

    def __init__(self, makers):
        context = multiprocessing.get_context("fork")
        self.pipes, self.processes = [], []
        self.sent = [0] * len(makers)
        self.replies = {}
        for maker in makers:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(maker, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    @property
    def count(self):
        return len(self.pipes)

    def start(self, worker, method, *arguments):
        """method: a name, or a module's function that is given the worker."""
        resolved = [getattr(argument, "value", argument) for argument in arguments]
        self.pipes[worker].send((method, resolved))
        self.sent[worker] += 1
        return Call(worker, self.sent[worker])

    def ask(self, function, *arguments):
        """What a module's function says of every worker."""
        calls = [self.start(worker, function, *arguments) for worker in range(self.count)]
        return self.finish(calls, what="answers")

    def finish(self, references, *, what, fetch=True, seconds=None):
        assert what, "a wait must say what it waits for"
        while missing := {call.worker for call in references if call not in self.replies}:
            ready = multiprocessing.connection.wait(
                [self.pipes[worker] for worker in missing], DEADLINE_SECONDS
            )
            assert ready, f"no rank answered within {DEADLINE_SECONDS} s"
            for pipe in ready:
                worker, (number, reply, failure) = self.pipes.index(pipe), pipe.recv()
                if failure is not None:
                    raise failure
                self.replies[Call(worker, number)] = reply
        return [self.replies.pop(call) for call in references] if fetch else []

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()


def _serve(maker, pipe):
    worker, number = None, 0
    while True:
        method, arguments = pipe.recv()
        number += 1
        try:
            worker = worker or maker()
            call = getattr(worker, method) if isinstance(method, str) else _bind(method, worker)
            pipe.send((number, call(*arguments), None))
        except Exception as failure:
            failure.add_note(traceback.format_exc())
            pipe.send((number, None, failure))


def _bind(function, worker):
    return lambda *arguments: function(worker, *arguments)
