"""Every rollout worker called at once, in this process: a thread for each call."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class ThreadedCalls:
    """Implements weights.client.EveryRolloutWorker over plain objects; references are futures."""

    def __init__(self, workers: Sequence[Any]) -> None:
        self.workers = list(workers)
        self._threads = ThreadPoolExecutor(len(self.workers))

    def start(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> list[Future[Any]]:
        return [
            self._threads.submit(getattr(worker, method), *arguments)
            for worker, arguments in zip(self.workers, argument_tuples, strict=True)
        ]

    def __call__(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> None:
        for call in self.start(method, argument_tuples):
            call.result()
