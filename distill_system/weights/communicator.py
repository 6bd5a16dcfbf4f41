"""A gloo process group of one sender and its receivers, with torch alone."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import BroadcastOptions
from torch.distributed.distributed_c10d import ProcessGroupGloo

from distill_system.weights.meeting import join_store

LEAVE_SECONDS = 2.0
"""Without a broadcast under way a group is left in milliseconds."""


class GlooCommunicator:
    """The part of vLLM's PyNcclCommunicator that weight transfer uses, over torch's gloo.

    It stands outside torch.distributed's default process group, which belongs to the learner's
    ranks. A store listens at address:port (meeting.open_store); every call fails after
    timeout_seconds, or at once when the store closes before all have joined.

    Raises: ResourceError if a rank does not come, or some do not reach one another.
    """

    def __init__(
        self, *, address: str, port: int, rank: int, world_size: int, timeout_seconds: float
    ) -> None:
        store = join_store(
            address,
            port,
            rank=rank,
            world_size=world_size,
            timeout_seconds=timeout_seconds,
            group="the weight-transfer group",
        )
        timeout = timedelta(seconds=timeout_seconds)
        self._group: Any = ProcessGroupGloo(store, rank, world_size, timeout)

    def broadcast(self, tensor: torch.Tensor, src: int) -> Any:
        """Begin to send `tensor` from rank src, or to receive into it; the result has a wait().

        Raises: RuntimeError, here or in wait(), if a peer is gone or the time is over; the group
        cannot be used afterwards.
        """
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        return self._group.broadcast([tensor], options)

    def destroy(self) -> None:
        """Close the connections; a broadcast under way keeps them open until it times out.

        It is waited for by another thread: its peer may be a process that nobody can end, on a
        node whose raylet is stopped, and the others are to go on.
        """
        held, self._group = [self._group], None
        closing = threading.Thread(target=held.clear, name="leaving a group", daemon=True)
        closing.start()
        closing.join(LEAVE_SECONDS)
