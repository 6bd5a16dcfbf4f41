"""The learner's ranks as one: sums over all of them, through torch.distributed."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """This rank's membership of the group; one rank alone needs no process group."""

    def __init__(
        self, *, rank: int, world_size: int, device: torch.device, timeout_seconds: float
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.timeout = timedelta(seconds=timeout_seconds)

    def connect(self, address: str, port: int) -> None:
        """Rendezvous with the other ranks at rank 0's address; gloo on CPU, NCCL on CUDA."""
        if self.world_size == 1:
            return
        dist.init_process_group(
            backend="nccl" if self.device.type == "cuda" else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=self.rank,
            world_size=self.world_size,
            timeout=self.timeout,
        )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks; a new tensor, the argument stays."""
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def sum_scalars(self, values: dict[str, Tensor]) -> dict[str, float]:
        """The sums over ranks of named scalars, in one transfer."""
        if not values:
            return {}
        shares = torch.stack([value.detach().double().reshape(()) for value in values.values()])
        return dict(zip(values, self.sum(shares).tolist(), strict=True))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over ranks, in one flat transfer."""
        if self.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, total in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(total.view_as(gradient))

    def close(self) -> None:
        """Leave the group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
