"""Parameters packed into few buffers of bytes: named tensors in -> uint8 buckets -> the same out.

Both ends cut the same list of parameters by the same rule, so only its names travel. No vLLM here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class ParameterShape(Protocol):
    """What is known of a parameter before it is gathered; vLLM's ParamMeta."""

    @property
    def name(self) -> str:
        """Its name in the model's checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype on the way."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its whole shape."""


def plan_buckets(
    parameters: Iterable[ParameterShape], bucket_bytes: int
) -> list[list[ParameterShape]]:
    """Cut the parameters into runs of at most bucket_bytes; a larger one is a run of its own."""
    plan: list[list[ParameterShape]] = []
    filled = 0
    for parameter in parameters:
        size = count_bytes(parameter)
        if not plan or filled + size > bucket_bytes:
            plan.append([])
            filled = 0
        plan[-1].append(parameter)
        filled += size
    return plan


class Buckets:
    """Memory for one set of parameters: a full copy of the model, in as few pieces as were planned.

    pinned: page-locked CPU memory, which a GPU reads and writes by itself.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterShape],
        *,
        bucket_bytes: int,
        device: torch.device,
        pinned: bool = False,
    ) -> None:
        self._plan = plan_buckets(parameters, bucket_bytes)
        sizes = [sum(map(count_bytes, run)) for run in self._plan]
        self.buffers = [
            torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned) for size in sizes
        ]
        self.num_bytes = sum(sizes)

    def fill(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copy whole tensors in, in the planned order; returns when nobody needs them any more."""
        tensors = iter(named)
        copying = _CopyStream(self.buffers)
        for buffer, run in zip(self.buffers, self._plan, strict=True):
            places = buffer.split([count_bytes(parameter) for parameter in run])
            # The parameters lead: exhausting the planned ones must not draw one tensor too many.
            for place, (_, tensor) in zip(places, tensors, strict=False):
                copying.copy(place, tensor.detach().contiguous().view(-1).view(torch.uint8))
        # A source that checks what it gives says at its end whether something was left over.
        for _ in tensors:
            raise AssertionError("more tensors came than were planned")
        copying.wait()

    def unpack(self, index: int) -> list[tuple[str, Tensor]]:
        """Names and tensors of one bucket: views of its memory wherever they can be."""
        run = self._plan[index]
        parts = self.buffers[index].split([count_bytes(parameter) for parameter in run])
        return [
            (parameter.name, _aligned(part, parameter.dtype).view(parameter.shape))
            for parameter, part in zip(run, parts, strict=True)
        ]


class _CopyStream:
    """Copies to the CPU beside the GPU's other work; plain copies where there is no GPU."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        pinned = bool(buffers) and buffers[0].is_pinned()
        self._stream: Any = torch.cuda.Stream() if pinned else None

    def copy(self, place: Tensor, source: Tensor) -> None:
        if self._stream is None or not source.is_cuda:
            place.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # the source may still be gathered
        with torch.cuda.stream(self._stream):
            place.copy_(source, non_blocking=True)
        source.record_stream(self._stream)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def count_bytes(parameter: ParameterShape) -> int:
    """Bytes of a parameter on the way."""
    return math.prod(parameter.shape) * parameter.dtype.itemsize


def _aligned(part_B: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; behind numbers of a smaller kind they may begin at an odd place."""
    if part_B.storage_offset() % dtype.itemsize:
        part_B = part_B.clone()
    return part_B.view(dtype)
