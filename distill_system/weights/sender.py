"""The sending end's group over gloo, on rank 0; the other learner ranks hold none."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from distill_system.weights.client import WeightSyncClient
from distill_system.weights.communicator import GlooCommunicator
from distill_system.weights.meeting import open_store
from distill_system.weights.transport import SENDER, run_in_background


class GlooSender:
    """Holds the group that rank 0 sends in.

    model_update_group: None on other ranks, and once it is closed.
    """

    def __init__(self, group: GlooCommunicator | None = None, store: Any = None) -> None:
        self.model_update_group: Any = group
        self._store = store

    @classmethod
    def open(
        cls,
        *,
        client: WeightSyncClient,
        address: str,
        port: int,
        world_size: int,
        bucket_bytes: int,
        timeout_seconds: float,
    ) -> GlooSender:
        """Open the group while every receiver joins it; returns when all have joined."""
        # Opening a group blocks until every rank is there, and the receivers join only when they
        # are called: so rank 0 opens it in the background and then calls them. If a call fails, the
        # store is dropped on the way out, and with it the wait of all others.
        store = open_store(address=address, port=port, timeout_seconds=timeout_seconds)
        opening: Future[GlooCommunicator] = run_in_background(
            lambda: GlooCommunicator(
                address=address,
                port=port,
                rank=SENDER,
                world_size=world_size,
                timeout_seconds=timeout_seconds,
            )
        )
        # Waited for before `opening`: a receiver's own error says more than rank 0's timeout.
        client.init_weight_transfer_engine(
            {
                "master_address": address,
                "master_port": port,
                "rank_offset": 1,
                "world_size": world_size,
                "packed": True,
                "packed_buffer_size_bytes": bucket_bytes,
                "timeout_seconds": timeout_seconds,
            }
        )
        return cls(opening.result(), store)

    def shutdown(self) -> None:
        """Leave the group."""
        if self.model_update_group is not None:
            self.model_update_group.destroy()
            self.model_update_group = self._store = None
