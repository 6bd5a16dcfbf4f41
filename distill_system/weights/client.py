"""What the learner says to the rollout workers while it publishes weights; no transport here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

CallAll = Callable[[str, list[tuple[Any, ...]]], None]


class WeightSyncClient(Protocol):
    """vLLM's four control calls, and ours that names the version.  Each reaches every worker.

    All block until each worker has answered; update_weights runs in a thread of its own while the
    learner broadcasts, so it must call all workers at once.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every worker join the group, each at a rank of its own."""

    def start_weight_update(self) -> None:
        """Open an update."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive: names, dtypes and shapes of what is being sent."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update; commit the version too if one is given."""

    def commit(self, version: int) -> None:
        """From now on, every worker labels what it writes with this version."""


class FanOutClient:
    """WeightSyncClient over any way of calling every worker.

    call_all(method, argument_tuples): call `method` of worker i with argument_tuples[i], all at
    once; wait for all; raise the first worker's error.
    ranks_per_worker: how many ranks of the group each worker takes, its tensor-parallel size.
    """

    def __init__(self, call_all: CallAll, ranks_per_worker: Sequence[int]) -> None:
        self._call_all = call_all
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
        self._call_all("init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        """See WeightSyncClient."""
        self._call_same("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """See WeightSyncClient."""
        self._call_same("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See WeightSyncClient."""
        self._call_same("finish_weight_update")
        if weight_version is not None:
            self.commit(int(weight_version))

    def commit(self, version: int) -> None:
        """See WeightSyncClient."""
        self._call_same("commit_weight_version", version)

    def _call_same(self, method: str, *arguments: object) -> None:
        self._call_all(method, [arguments] * len(self._ranks_per_worker))
