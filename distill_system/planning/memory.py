"""What an account of a worker's memory is made of."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

GIB = 2**30
PROCESS_BYTES = {"cpu": 0.6 * GIB, "cuda": 1.0 * GIB}
"""What a worker holds before it has a model: on a CPU Python with torch and transformers, as the
system counts its pages; on a GPU the CUDA context and NCCL's buffers (an assumption)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The moment at which a worker holds most.

    parts: bytes by name. lowered_by: what to change in the configuration where a part is too large.
    host_bytes: what it keeps in CPU memory instead.
    """

    moment: str
    parts: Mapping[str, float]
    lowered_by: Mapping[str, str]
    host_bytes: float = 0.0

    @property
    def num_bytes(self) -> float:
        """All parts together, the process itself left out."""
        return sum(self.parts.values())

    @property
    def by_size(self) -> list[str]:
        """The parts' names, the largest first."""
        return sorted(self.parts, key=lambda name: -self.parts[name])


def fullest_moment(
    moments: Mapping[str, Mapping[str, float]],
    lowered_by: Mapping[str, str],
    elsewhere: Set[str] = frozenset(),
) -> Memory:
    """The account of the moment that holds most, of bytes by moment and part.

    elsewhere: parts that are kept in CPU memory.
    """
    accounts = [
        Memory(
            moment=moment,
            parts={n: size for n, size in sizes.items() if size > 0 and n not in elsewhere},
            lowered_by=lowered_by,
            host_bytes=sum(size for name, size in sizes.items() if name in elsewhere),
        )
        for moment, sizes in moments.items()
    ]
    return max(accounts, key=lambda memory: memory.num_bytes)
