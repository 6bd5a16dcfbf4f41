"""Parameters packed into a few uint8 buffers: named tensors in -> buckets -> the same tensors out.

Sender and receiver divide the same list of parameters by the same rule (plan_buckets), so they
agree on the layout without sending it. This module does not import vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class ParameterShape(Protocol):
    """Name, dtype and shape of a parameter, known before it is gathered; vLLM's ParamMeta."""

    @property
    def name(self) -> str:
        """Its name in the model's checkpoint."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it is sent."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape before sharding."""


@dataclass(frozen=True, slots=True)
class ParameterMetadata:
    """A ParameterShape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def describe_parameters(parameters: Sequence[ParameterShape]) -> dict[str, Any]:
    """What a receiving end is told of the parameters that come, in a form that vLLM's reads too."""
    return {
        "names": [parameter.name for parameter in parameters],
        "dtype_names": [str(parameter.dtype).removeprefix("torch.") for parameter in parameters],
        "shapes": [list(parameter.shape) for parameter in parameters],
    }


def read_parameters(described: Mapping[str, Any]) -> list[ParameterMetadata]:
    """What describe_parameters was given."""
    fields = zip(described["names"], described["dtype_names"], described["shapes"], strict=True)
    return [
        ParameterMetadata(name, getattr(torch, dtype), tuple(shape))
        for name, dtype, shape in fields
    ]


def plan_buckets(
    parameters: Iterable[ParameterShape], bucket_bytes: int
) -> list[list[ParameterShape]]:
    """Group consecutive parameters into buckets of at most bucket_bytes.

    A parameter that is larger than that gets a bucket of its own.
    """
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
    """Memory for a full copy of the model, one buffer for each planned bucket.

    device: where the buffers lie.  pinned: allocate page-locked CPU memory, which a GPU copies to
    and from asynchronously.
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
        sizes = [sum(map(count_bytes, bucket)) for bucket in self._plan]
        self.buffers = [
            torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned) for size in sizes
        ]
        self.num_bytes = sum(sizes)

    def fill(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Copy whole tensors into the buffers, in the planned order.

        Returns once the copies are complete, so that the caller may change the tensors.
        """
        tensors = iter(named)
        copying = _CopyStream(self.buffers)
        for buffer, bucket in zip(self.buffers, self._plan, strict=True):
            places = buffer.split([count_bytes(parameter) for parameter in bucket])
            # `places` comes first: zip asks its first argument first, so that at a bucket's end no
            # tensor of the next bucket is drawn and lost.
            for place, (_, tensor) in zip(places, tensors, strict=False):
                copying.copy(place, tensor.detach().contiguous().view(-1).view(torch.uint8))
        # Asking once more also lets a checking source raise its own error at its end.
        for _ in tensors:
            raise AssertionError("more tensors came than were planned")
        copying.wait()

    def unpack(self, index: int) -> list[tuple[str, Tensor]]:
        """Names and tensors of one bucket; see unpack."""
        return unpack(self._plan[index], self.buffers[index])


def unpack(bucket: Sequence[ParameterShape], buffer_B: Tensor) -> list[tuple[str, Tensor]]:
    """Names and tensors of one bucket, as views of its memory where alignment allows."""
    parts = buffer_B.split([count_bytes(parameter) for parameter in bucket])
    return [
        (parameter.name, _aligned(part, parameter.dtype).view(parameter.shape))
        for parameter, part in zip(bucket, parts, strict=True)
    ]


class _CopyStream:
    """Copies from a GPU into pinned memory on a stream of its own; plain copies without a GPU."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        pinned = bool(buffers) and buffers[0].is_pinned()
        self._stream: Any = torch.cuda.Stream() if pinned else None

    def copy(self, place: Tensor, source: Tensor) -> None:
        if self._stream is None or not source.is_cuda:
            place.copy_(source)
            return
        # The kernel that makes the source (an all-gather) may still run on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            place.copy_(source, non_blocking=True)
        # Or the allocator could give the source's memory to others while the copy still reads it.
        source.record_stream(self._stream)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def count_bytes(parameter: ParameterShape) -> int:
    """Bytes of a parameter in the dtype in which it is sent."""
    return math.prod(parameter.shape) * parameter.dtype.itemsize


def _aligned(part_B: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes as numbers of this dtype.

    After parameters of a smaller dtype, a part may begin at an offset that is no multiple of the
    dtype's size; torch refuses to view such memory, so it is copied.
    """
    if part_B.storage_offset() % dtype.itemsize:
        part_B = part_B.clone()
    return part_B.view(dtype)
