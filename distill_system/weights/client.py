"""The calls that a publisher makes to the rollout workers; the bytes travel elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

from distill_system.workers import Reference


class EveryRolloutWorker(Protocol):
    """Calls one method of every rollout worker at once; see cluster.EveryWorker."""

    def start(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> list[Reference]:
        """Begin the call of every worker: worker i gets argument_tuples[i]."""

    def __call__(self, method: str, argument_tuples: Sequence[tuple[Any, ...]]) -> None:
        """Call every worker and wait.  Raises: the first worker's error; DeadlineError."""


class WeightSyncClient(Protocol):
    """What a publisher needs of the rollout workers.

    The first method's name is vLLM's: its trainer engines call it.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every worker join the transfer group at its own rank; returns when all have."""

    def start_receiving(self, version: int, update_info: dict[str, Any]) -> list[Reference]:
        """Let every worker receive a version; returns at once, with a reference per worker."""


class FanOutClient:
    """Implements WeightSyncClient by calling every worker.

    ranks_per_worker: ranks of the transfer group that each worker takes: its tensor-parallel size.
    """

    def __init__(self, workers: EveryRolloutWorker, ranks_per_worker: Sequence[int]) -> None:
        self._workers = workers
        self._ranks_per_worker = tuple(ranks_per_worker)

    @property
    def num_receivers(self) -> int:
        """Ranks of the transfer group without the sender's."""
        return sum(self._ranks_per_worker)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See WeightSyncClient."""
        # Every engine numbers its own ranks from 0 and adds rank_offset. vLLM gives one offset for
        # all; two engines would then claim the same rank, and the group would never be complete.
        first = init_info["rank_offset"]
        offsets = accumulate(self._ranks_per_worker[:-1], initial=first)
        infos = [({**init_info, "rank_offset": offset},) for offset in offsets]
        self._workers("init_weight_transfer_engine", infos)

    def start_receiving(self, version: int, update_info: dict[str, Any]) -> list[Reference]:
        """See WeightSyncClient."""
        arguments = [(version, update_info)] * len(self._ranks_per_worker)
        return self._workers.start("receive_weights", arguments)
