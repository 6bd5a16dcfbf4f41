"""What every receiving end does: take all bytes in, compare them with the sender's seal.

Staged, all stand in memory before any is loaded: a transfer that fails has changed nothing, at the
price of the model's bytes a second time. Streamed, each bucket is loaded as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distill_system.weights.buckets import (
    Buckets,
    ParameterShape,
    count_bytes,
    plan_buckets,
    unpack,
)
from distill_system.weights.transport import Seal, broadcast_buckets, check_seal


class SealedBuckets:
    """Memory that weights arrive in.

    On a CPU it is kept for the next version, because touching fresh pages takes longer than
    receiving into them.

    received: seal of the last transfer whose bytes all came; None before the first.
    """

    def __init__(self) -> None:
        self.received: Seal | None = None
        # With what it was made for: parameters and bucket size.
        self._kept: tuple[Sequence[ParameterShape], int, Buckets] | None = None

    def receive(
        self,
        communicator: Any,
        parameters: Sequence[ParameterShape],
        *,
        bucket_bytes: int,
        device: torch.device,
    ) -> Buckets:
        """Receive every byte.

        Raises: TransferError if the bytes are not those that were sent; all have arrived then, so
        the group can be used again. Whatever the communicator raises if they do not arrive.
        """
        buckets = self.allocate(parameters, bucket_bytes=bucket_bytes, device=device)
        self.received = broadcast_buckets(communicator, buckets.buffers)
        check_seal(communicator, self.received, device)
        return buckets

    def stream(
        self,
        communicator: Any,
        parameters: Sequence[ParameterShape],
        load: Callable[[list[tuple[str, Tensor]]], object],
        *,
        bucket_bytes: int,
        device: torch.device,
    ) -> None:
        """Receive bucket by bucket, each loaded while the next one comes; two are held at most.

        A bucket's memory is its own: a loader may keep its tensors until a layer is complete.
        Raises: as receive does; what was loaded before is loaded.
        """
        plan = plan_buckets(parameters, bucket_bytes)
        coming = iter(plan)

        def load_next(buffer_B: Tensor) -> None:
            load(unpack(next(coming), buffer_B))

        made = (
            torch.empty(sum(map(count_bytes, bucket)), dtype=torch.uint8, device=device)
            for bucket in plan
        )
        self.received = broadcast_buckets(communicator, made, load_next)
        check_seal(communicator, self.received, device)

    def allocate(
        self, parameters: Sequence[ParameterShape], *, bucket_bytes: int, device: torch.device
    ) -> Buckets:
        """Memory for them: the last version's, if it fits and was kept."""
        if self._kept is not None and self._kept[:2] == (parameters, bucket_bytes):
            return self._kept[2]
        self._kept = None  # free it first, or two copies would be held at once
        buckets = Buckets(parameters, bucket_bytes=bucket_bytes, device=device)
        if device.type == "cpu":
            self._kept = (parameters, bucket_bytes, buckets)
        return buckets
