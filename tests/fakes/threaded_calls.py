"""Every rollout worker called at once, in this process: a thread for each call."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fakes.interfaces import require_call


class ThreadedCalls:
    """Implements weights.client.EveryRolloutWorker over plain objects; references are futures.

    stands_for: the class whose methods may be called, where the objects only stand for it; by
    default each object's own.
    """

    def __init__(self, workers: Sequence[Any], *, stands_for: type | None = None) -> None:
        self.workers = list(workers)
        self.stands_for = stands_for
        self._threads = ThreadPoolExecutor(len(self.workers))

    def start(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> list[Future[Any]]:
        pairs = list(zip(self.workers, argument_tuples, strict=True))
        for worker, arguments in pairs:
            require_call(self.stands_for or type(worker), method, arguments)
        return [self._threads.submit(getattr(worker, method), *given) for worker, given in pairs]

    def __call__(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> None:
        for call in self.start(method, argument_tuples):
            call.result()
