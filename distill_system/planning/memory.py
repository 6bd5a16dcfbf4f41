"""What an account of a worker's memory is made of; a scorer's, and a rollout engine's.

scorer = weights + action embeddings + a forward pass + rows of a call + a chunk
engine = weights + key-value cache, or the share of the GPU that it is given
"""

from __future__ import annotations

from dataclasses import dataclass

from distill_system.planning.activations import BFLOAT16, FLOAT32, reading_bytes_per_token
from distill_system.planning.shapes import ModelShape

GIB = 2**30
PROCESS_BYTES = {"cpu": 0.6 * GIB, "cuda": 1.0 * GIB}
"""What a worker holds before it has a model: on a CPU Python with torch and transformers, as the
system counts its pages; on a GPU the CUDA context and NCCL's buffers (an assumption)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    """One line of a worker's account. lowered_by: what to change in the configuration."""

    name: str
    num_bytes: float
    lowered_by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The moment at which a worker holds most. host_bytes: what it keeps in CPU memory instead."""

    moment: str
    parts: tuple[MemoryPart, ...]
    host_bytes: float = 0.0

    @property
    def num_bytes(self) -> float:
        """All parts together, the process itself left out."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def largest(self) -> MemoryPart:
        """What dominates."""
        return max(self.parts, key=lambda part: part.num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerLoad:
    """What one scorer holds and reads.

    row_tokens: response tokens of one call. batch_tokens: of one forward pass, prompts included.
    """

    teacher: ModelShape
    number_bytes: int
    batch_tokens: int
    row_tokens: int
    chunk_tokens: int
    action_columns: int
    reads_vocabulary: bool


def scorer_memory(load: ScorerLoad) -> Memory:
    """A scorer in the middle of a call."""
    teacher = load.teacher
    chunk = min(load.chunk_tokens, load.row_tokens) * teacher.vocabulary * load.reads_vocabulary
    copies = FLOAT32 + (BFLOAT16 if load.number_bytes == BFLOAT16 else 0)
    rows = 2 * load.number_bytes * teacher.row_size + FLOAT32 * load.action_columns
    parts = (
        MemoryPart(
            name="weights",
            num_bytes=load.number_bytes * teacher.num_parameters,
            lowered_by="scoring.dtype=bfloat16",
        ),
        MemoryPart(
            name="action embeddings",
            num_bytes=FLOAT32 * teacher.vocabulary * load.action_columns,
            lowered_by="distill.action_dimension",
        ),
        MemoryPart(
            name="a forward pass",
            num_bytes=load.batch_tokens * reading_bytes_per_token(teacher, load.number_bytes),
            lowered_by="scoring.max_tokens_per_batch",
        ),
        MemoryPart(
            name="rows of a call",
            num_bytes=float(load.row_tokens * rows),
            lowered_by="pools.teacher_scoring.count",
        ),
        MemoryPart(
            name="chunk over the vocabulary",
            num_bytes=float(copies * chunk),
            lowered_by="learner.vocabulary_chunk_tokens",
        ),
    )
    return Memory(moment="scoring", parts=tuple(part for part in parts if part.num_bytes))


def engine_memory(
    shape: ModelShape,
    *,
    number_bytes: int,
    tensor_parallel_size: int,
    cache_bytes: float,
    key: str,
) -> Memory:
    """A rollout engine: its share of the weights, and the key-value cache that it is given."""
    weights = number_bytes * shape.num_parameters / tensor_parallel_size
    return Memory(
        moment="generating",
        parts=(
            MemoryPart(
                name="weights",
                num_bytes=weights,
                lowered_by=f"rollout.{key}.dtype=bfloat16, more GPUs a worker",
            ),
            MemoryPart(
                name="key-value cache",
                num_bytes=cache_bytes,
                lowered_by=f"rollout.{key}.kv_cache_mebibytes",
            ),
        ),
    )


def cache_bytes_per_token(
    shape: ModelShape, *, number_bytes: int, tensor_parallel_size: int
) -> float:
    """Keys and values of every block, for each token of each sequence that is being written."""
    return 2.0 * number_bytes * shape.num_blocks * shape.key_size / tensor_parallel_size
