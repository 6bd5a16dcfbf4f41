"""A worker of several ranks: the first is the worker to everyone else, and starts the others.

Ray ends what a process has started with that process, so the ranks go together. Where one of the
others dies, or fails beyond use, the first ends too: it may be in a collective that waits for that
one as long as any call may take.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from distill_system.cluster.liveness import LivenessMonitor
from distill_system.cluster.placement import Placement, WorkerRequest, start_process
from distill_system.cluster.waiting import wait_for
from distill_system.errors import DistillError
from distill_system.logs import LOGGER_NAME
from distill_system.workers import Reference

LOOK_SECONDS = 1.0
"""Between two looks whether the other ranks are alive."""


def start_worker(
    request: WorkerRequest, worker_id: int, arguments: Mapping[str, Any], place: Placement
) -> Any:
    """Start a worker in its place; returns the handle of its first rank at once."""
    name = f"{request.name}-{worker_id}"
    if request.ranks > 1:
        arguments = {**arguments, "peers": RankPeers(request, name, arguments, place)}
    return start_process(request, name, arguments, place)


class RankPeers:
    """Implements workers.Peers; made where the worker is placed, used in its first rank's process.

    worker: its name, by which errors of the other ranks are told.
    arguments: of every rank, but for `rank`.
    """

    def __init__(
        self, request: WorkerRequest, worker: str, arguments: Mapping[str, Any], place: Placement
    ) -> None:
        self._request = replace(request, arguments=[])
        self._worker, self._arguments = worker, dict(arguments)
        self._place = place
        self._handles: dict[str, Any] = {}
        self._under_way: list[Reference] = []

    def start(self) -> None:
        """See Peers."""
        for rank in range(1, self._request.ranks):
            name, place = f"{self._worker}-rank-{rank}", replace(self._place, bundle_index=rank)
            arguments = {**self._arguments, "rank": rank}
            self._handles[name] = start_process(self._request, name, arguments, place)
        self._monitor = LivenessMonitor(self._handles)
        threading.Thread(target=self._end_with_them, name="peers", daemon=True).start()

    def call(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> list[Reference]:
        """See Peers."""
        self._under_way = [
            getattr(handle, method).remote(*arguments)
            for handle, arguments in zip(self._handles.values(), argument_tuples, strict=True)
        ]
        return self._under_way

    def finish(self, references: Sequence[Reference], *, what: str, seconds: float) -> list[Any]:
        """See Peers."""
        try:
            results = wait_for(references, self._monitor, what=what, seconds=seconds)
        except DistillError as error:
            error.worker = self._worker  # who replaces workers knows it by this name
            raise
        self._under_way = []
        return results

    def _end_with_them(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                self._monitor.require_alive(seconds=0.0, waiting_for="its fellow ranks")
                self._require_no_failure()
            except (DistillError, RayError) as lost:
                logging.getLogger(LOGGER_NAME).error(
                    "%s ends with its rank: %s", self._worker, lost
                )
                os._exit(1)

    def _require_no_failure(self) -> None:
        """Raises: what a rank raised, unless it is an error that all ranks agree on."""
        calls = list(self._under_way)
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=0) if calls else ([], [])
        try:
            ray.get(done)
        except RayTaskError as error:
            if not isinstance(error.cause, DistillError):
                raise
