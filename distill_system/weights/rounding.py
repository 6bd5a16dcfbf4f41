"""Parameters in the precision in which engines hold them: float32 tensors in, what is sent out.

A bfloat16 number has 8 significant bits: near 0.1 the next one is 5e-4 away, while a step of Adam
at a learning rate of 1e-5 moves a weight by about 1e-5. Rounded to the nearest number, nearly all
weights stay where they were for dozens of steps, although all of them move to where the loss
falls: the engine goes on writing as the student of long ago. Rounded up as often as they are near
the upper number, they are right on average, and so is a sum over thousands of them (docs/log.md,
"a bfloat16 engine that stands still").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_system.seeds import derive_seed

_CHUNK_NUMBERS = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Numbers that share a seed: whoever holds a part of a tensor draws for that part alone. A CPU's
fit into its cache, a GPU's keep it busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireFormat:
    """In which precision weights are sent, and how they are rounded to it.

    dtype: of what is sent of float32 parameters: float32, bfloat16 or float16.
    seed: of stochastic rounding, which is to bfloat16 alone; None rounds to the nearest.
    """

    dtype: torch.dtype = torch.float32
    seed: int | None = None

    @property
    def is_stochastic(self) -> bool:
        """Whether what is sent of float32 parameters is drawn."""
        return self.seed is not None and self.dtype is torch.bfloat16

    def sent_dtype(self, own: torch.dtype) -> torch.dtype:
        """The dtype in which a tensor of this dtype is sent."""
        return self.dtype if own is torch.float32 else own

    def convert(
        self, named: Iterable[tuple[str, Tensor]], *, version: int
    ) -> Iterator[tuple[str, Tensor]]:
        """Each tensor as it is sent; its rounding depends on seed, version and name alone."""
        for name, tensor in named:
            yield name, self.round(name, tensor, version=version)

    def round(self, name: str, tensor: Tensor, *, version: int, offset: int = 0) -> Tensor:
        """A tensor, or the part of it behind `offset` numbers, as it is sent."""
        dtype = self.sent_dtype(tensor.dtype)
        if self.seed is None or dtype is not torch.bfloat16 or dtype is tensor.dtype:
            return tensor.to(dtype)
        seed = derive_seed(self.seed, "rounding", version, name)
        return round_stochastically(tensor, seed=seed, offset=offset)


AS_THEY_ARE = WireFormat()
"""Parameters as they are."""


def round_stochastically(tensor: Tensor, *, seed: int, offset: int = 0) -> Tensor:
    """Round each number to one of its two bfloat16 neighbours, so that the mean is the number.

    tensor: float32, any shape; returns bfloat16 of that shape on its device. A number that bfloat16
    has stays what it is. Where an infinity or a NaN is near, numbers go to the nearest.
    seed: the same seed gives the same bits on the same kind of device.
    offset: numbers of a larger tensor that stand before this one: its rows are rounded alike
        whether they come alone or within it.
    """
    numbers_N = tensor.detach().contiguous().view(-1)
    rounded_N = torch.empty_like(numbers_N, dtype=torch.bfloat16)
    generator = torch.Generator(numbers_N.device)
    size = _CHUNK_NUMBERS[numbers_N.device.type]
    place = 0
    while place < numbers_N.numel():
        chunk, before = divmod(offset + place, size)
        end = place + size - before
        part_n = numbers_N[place:end]
        generator.manual_seed((seed + chunk) % 2**32)  # a CPU's generator takes 32 bits of it
        # What a GPU draws first depends on how many it is asked for: there always a whole chunk's.
        count = size if numbers_N.is_cuda else before + part_n.numel()
        bits_n = _random_bits(count, generator)[before : before + part_n.numel()]
        _round_chunk(part_n, rounded_N[place:end], bits_n)
        place = end
    return rounded_N.view(tensor.shape)


def _round_chunk(part_n: Tensor, place_n: Tensor, bits_n: Tensor) -> None:
    # The upper half of a float32 number's bits is the bfloat16 number next to it, on the side of
    # zero. 16 random bits added to the lower half carry into it as often as is right.
    sums_n = bits_n.to(torch.int32)
    if not part_n.sum().isfinite():
        place_n.copy_(part_n)  # a NaN's bits could carry into the sign's, and become a zero
        return
    sums_n += part_n.view(torch.int32)
    place_n.view(torch.int16).copy_(sums_n.view(torch.int16)[1::2])


def _random_bits(count: int, generator: torch.Generator) -> Tensor:
    """uint16 [count], uniform."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)  # four numbers a draw: all 64 bits
    return words.view(torch.uint16)[:count]
