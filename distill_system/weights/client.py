"""What the learner says to the rollout workers while it publishes weights; no transport here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

from distill_system.workers import Reference


class EveryRolloutWorker(Protocol):
    """A way of calling every rollout worker, all at once."""

    def start(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> list[Reference]:
        """Begin a call of each: worker i gets argument_tuples[i]."""

    def __call__(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> None:
        """The same, and wait for all.  Raises: the first worker's error; DeadlineError."""


class WeightSyncClient(Protocol):
    """What a publisher asks of the rollout workers."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every worker join the group, each at a rank of its own; returns when all have."""

    def start_receiving(self, version: int, update_info: dict[str, Any]) -> list[Reference]:
        """Let every worker take a version in; nobody waits here."""


class FanOutClient:
    """WeightSyncClient over any way of calling every worker.

    ranks_per_worker: how many ranks of the group each worker takes, its tensor-parallel size.
    """

    def __init__(self, workers: EveryRolloutWorker, ranks_per_worker: Sequence[int]) -> None:
        self._workers = workers
        self._ranks_per_worker = tuple(ranks_per_worker)

    @property
    def num_receivers(self) -> int:
        """Ranks of the group besides the sender's."""
        return sum(self._ranks_per_worker)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See WeightSyncClient.

        Each engine counts its own ranks from 0, so each gets an offset of its own: with a shared
        one they would all claim the same rank, and none would ever be served.
        """
        first = init_info["rank_offset"]
        offsets = accumulate(self._ranks_per_worker[:-1], initial=first)
        infos = [({**init_info, "rank_offset": offset},) for offset in offsets]
        self._workers("init_weight_transfer_engine", infos)

    def start_receiving(self, version: int, update_info: dict[str, Any]) -> list[Reference]:
        """See WeightSyncClient."""
        arguments = [(version, update_info)] * len(self._ranks_per_worker)
        return self._workers.start("receive_weights", arguments)
