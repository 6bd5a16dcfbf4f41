"""Ranks as one, the learner's or a scorer's: sums over all of them, through torch.distributed."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distill_system.weights.meeting import join_store, open_store

Number = TypeVar("Number", int, float)

MEETING_SECONDS = 60.0
"""For ranks that have all loaded their model to come to one address."""


class Ranks:
    """This rank's membership of the group.

    alone: one rank that needs no process group.
    group: what the ranks are together, for messages.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        timeout_seconds: float,
        alone: bool,
        group: str = "the learner's ranks",
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.timeout = timedelta(seconds=timeout_seconds)
        self.alone = alone
        self.group = group
        self._store: Any = None  # where the ranks meet, held by rank 0 until they part

    def connect(self, address: str, port: int) -> None:
        """Rendezvous with the other ranks at rank 0's address; gloo on CPU, NCCL on CUDA.

        Raises: ResourceError if the ranks do not reach one another.
        """
        if self.alone:
            return
        seconds = min(MEETING_SECONDS, self.timeout.total_seconds())
        if self.rank == 0:
            self._store = open_store(address=address, port=port, timeout_seconds=seconds)
        store = join_store(
            address,
            port,
            rank=self.rank,
            world_size=self.world_size,
            timeout_seconds=seconds,
            group=self.group,
        )
        store.set_timeout(self.timeout)
        dist.init_process_group(
            # What is offloaded is summed on the CPU, on machines with GPUs too.
            backend="cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=self.timeout,
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks; a new tensor, the argument stays."""
        if self.world_size == 1:
            return tensor
        total = tensor.clone()  # all_reduce works in place
        dist.all_reduce(total)
        return total

    def sum_scalars(self, values: dict[str, Tensor]) -> dict[str, float]:
        """The sums over ranks of named scalars, in one transfer."""
        if not values:
            return {}
        # float64: token counts above 2^24 are not exact in float32
        to_device = partial(Tensor.to, device=self.device, dtype=torch.float64, non_blocking=True)
        shares = torch.stack([to_device(value.detach()).reshape(()) for value in values.values()])
        return dict(zip(values, self.sum(shares).tolist(), strict=True))

    def max(self, value: Number) -> Number:
        """The largest of the ranks' values; float32 where they are fractions."""
        if self.world_size == 1:
            return value
        # torch's default of a Python float: 24 bits, enough for a metric
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return type(value)(largest.item())

    def close(self) -> None:
        """Leave the group."""
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()
        self._store = None
