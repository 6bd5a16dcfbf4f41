"""What autograd keeps of a transformer block for each token, from the block's own arithmetic.

Read off the forward pass of a Llama block, H hidden size, A = heads x head size, K = key heads x
head size, I intermediate size; an operation keeps what its derivative needs:

    norm 1      its input x (H), x / |x| (H), and its output (H), which q, k and v multiply
    attention   q after rotation (A), k (K), v (K), its output (A), which the next layer multiplies
    norm 2      as norm 1: 3 H
    MLP         gate (I), silu(gate) (I), up (I), their product (I)
    residuals   an addition keeps nothing

so 6 H + 2 A + 2 K + 4 I numbers, and a few per head (the attention's log-sum-exp, float32). In
float32 each takes 4 bytes. In bfloat16 each takes 2, but norms compute in float32 and keep their
input so. Under autocast (bfloat16 on a rank that shards nothing) the residual stream stays float32,
each linear layer keeps a bfloat16 copy of its input of its own, and of its weight.

Other families differ in their norms and MLPs: see FAMILIES.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from distill_system.planning.shapes import ModelShape

FLOAT32, BFLOAT16 = 4, 2


class Arithmetic(StrEnum):
    """How the student computes: all in float32; bfloat16 throughout; or bfloat16 by autocast."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    AUTOCAST = "autocast"

    @property
    def num_bytes(self) -> int:
        """Of one number of what is multiplied."""
        return FLOAT32 if self is Arithmetic.FLOAT32 else BFLOAT16


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockKeeps:
    """What a family's block keeps beside its attention, in rows of H and of I.

    norm_rows: of one of its two norms, output included. norm_float32_rows: how many of these are
    float32 in bfloat16. autocast_casts: copies of norm outputs that linear layers make under
    autocast. mlp_rows: of I. normalises_heads: queries and keys have norms of their own.
    """

    norm_rows: int = 3
    norm_float32_rows: int = 1
    autocast_casts: int = 5
    mlp_rows: int = 4
    normalises_heads: bool = False


FAMILIES = {
    "qwen3": BlockKeeps(normalises_heads=True),
    "gemma": BlockKeeps(norm_float32_rows=2),  # multiplies by its weight in float32
    # Layer norm keeps its input and two numbers; its output is what the next layer multiplies.
    "gpt2": BlockKeeps(norm_rows=2, norm_float32_rows=0, autocast_casts=2, mlp_rows=5),
    "opt": BlockKeeps(norm_rows=2, norm_float32_rows=0, autocast_casts=4, mlp_rows=1),
}
"""By model_type; every other family is taken for Llama's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a model's blocks are read.

    checkpointing: each block keeps its input alone. in_rectangles: attention copies its rows into
    rectangles and its output back, where there is no kernel for packed lines (CPUs, float32).
    learns_norms: a norm whose weight is frozen does not keep x / |x|.
    """

    arithmetic: Arithmetic
    checkpointing: bool = False
    in_rectangles: bool = False
    learns_norms: bool = True

    @property
    def residual_bytes(self) -> int:
        """Of one number of the residual stream."""
        return BFLOAT16 if self.arithmetic is Arithmetic.BFLOAT16 else FLOAT32


def block_bytes_per_token(shape: ModelShape, reading: Reading) -> float:
    """Bytes that one block keeps for each token until its backward pass, without checkpointing."""
    keeps = FAMILIES.get(shape.family, BlockKeeps())
    number = reading.arithmetic.num_bytes
    attention = (2 + reading.in_rectangles) * shape.query_size + 2 * shape.key_size
    head_norms = keeps.normalises_heads * (shape.query_size + shape.key_size)
    return (
        _norm_bytes(keeps, reading) * shape.hidden_size
        + number * (attention + keeps.mlp_rows * shape.intermediate_size)
        + (FLOAT32 + number) * head_norms
        + FLOAT32 * shape.num_heads
    )


def _norm_bytes(keeps: BlockKeeps, reading: Reading) -> int:
    """Of both norms of a block, for each column of H."""
    frozen = keeps.norm_rows == 3 and not reading.learns_norms
    rows = keeps.norm_rows - frozen
    if reading.arithmetic is Arithmetic.AUTOCAST:
        return 2 * (rows - 1) * FLOAT32 + keeps.autocast_casts * BFLOAT16
    wide = keeps.norm_float32_rows if reading.arithmetic is Arithmetic.BFLOAT16 else rows
    return 2 * (wide * FLOAT32 + (rows - wide) * BFLOAT16)


def activation_bytes_per_token(shape: ModelShape, reading: Reading) -> float:
    """What a forward pass keeps of all blocks, of the final norm and of the token's id."""
    residual = reading.residual_bytes * shape.hidden_size
    block = residual if reading.checkpointing else block_bytes_per_token(shape, reading)
    return shape.num_blocks * block + 2 * residual + 8


def backward_bytes_per_token(shape: ModelShape, reading: Reading) -> float:
    """What the backward pass of the last block adds to that, when the others still keep theirs.

    The residual stream's gradient twice and one row of the MLP's: what was kept goes as gradients
    come. With checkpointing the block's own forward pass again.
    """
    number = reading.arithmetic.num_bytes
    gradients = 2 * reading.residual_bytes * shape.hidden_size + number * shape.intermediate_size
    again = block_bytes_per_token(shape, reading) if reading.checkpointing else 0.0
    return gradients + again


def reading_bytes_per_token(shape: ModelShape, num_bytes: int) -> float:
    """What a forward pass without gradients holds at once, in the MLP or in attention.

    The residual stream twice and its norm's output, then either gate, up and their product, or
    queries, keys and values before and after rotation.
    """
    inside = max(3 * shape.intermediate_size, 3 * shape.query_size + 4 * shape.key_size)
    return float(num_bytes * (3 * shape.hidden_size + inside))
