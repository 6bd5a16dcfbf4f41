"""Bytes of one learner rank, from the student's sizes and those of its batches.

weights + optimizer + frozen matrices at rest, and the largest of
    loss        activations of a part + rows of the step + a chunk over the vocabulary
                + gradients of the unembedding
    backward    activations of a part + backward of its last block + rows of the step
                + gradients: the unembedding's, from a second part on those of all weights
    first block gradients of all weights and of the embeddings + one block's activations
    optimizer   gradients + what the optimizer makes on the way
"""

from __future__ import annotations

from dataclasses import dataclass

from distill_system.planning.activations import (
    BFLOAT16,
    FLOAT32,
    Arithmetic,
    Reading,
    activation_bytes_per_token,
    backward_bytes_per_token,
)
from distill_system.planning.memory import Memory, MemoryPart
from distill_system.planning.shapes import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerLoad:
    """What one learner rank holds and reads.

    step_tokens: response tokens of the rank's step, N. part_tokens: tokens, prompts included, whose
    activations are held at once. num_parts: of a step. feature_columns, action_columns: F and R of
    what the teacher sends, 0 if it sends none. softmax_reads: streams whose expected embeddings are
    read (AMMD). token_sums: streams with a token loss. teacher_columns: of the teacher's
    unembedding, 0 where the objective does without. num_adapter: parameters of adapters, 0 if all
    weights learn.
    """

    student: ModelShape
    compute_dtype: str = "float32"
    optimizer: str = "adamw"
    num_ranks: int = 1
    shard_ranks: int = 1
    step_tokens: int
    part_tokens: int
    num_parts: int = 1
    chunk_tokens: int
    feature_columns: int = 0
    action_columns: int = 0
    softmax_reads: int = 0
    token_sums: int = 0
    teacher_columns: int = 0
    teacher_number_bytes: int = FLOAT32
    num_adapter: int = 0
    checkpointing: bool = False
    offload: bool = False
    on_gpu: bool = False

    @property
    def is_wrapped(self) -> bool:
        """Whether FSDP2 gathers the model; a rank alone without offload wraps nothing."""
        return self.num_ranks > 1 or self.offload

    @property
    def arithmetic(self) -> Arithmetic:
        """A wrapped model is gathered in bfloat16, another is cast by autocast."""
        if self.compute_dtype == "float32":
            return Arithmetic.FLOAT32
        return Arithmetic.BFLOAT16 if self.is_wrapped else Arithmetic.AUTOCAST

    @property
    def reading(self) -> Reading:
        """How the student's blocks are read; only a GPU has a kernel for packed lines."""
        return Reading(
            arithmetic=self.arithmetic,
            checkpointing=self.checkpointing,
            in_rectangles=not (self.on_gpu and self.compute_dtype == "bfloat16"),
            learns_norms=not self.num_adapter,
        )

    @property
    def num_learning(self) -> int:
        """Parameters with a gradient."""
        return self.num_adapter or self.student.num_parameters

    @property
    def num_held(self) -> int:
        """All parameters, adapters included."""
        return self.student.num_parameters + self.num_adapter


RESTING = ("weights", "optimizer state", "gradients")
"""What learner.offload keeps in CPU memory."""


def learner_memory(load: LearnerLoad) -> Memory:
    """The fullest moment of a learner rank's step."""
    gradients, rows = _gradients(load), _rows(load)
    kept, block = _activations(load), _block(load)
    chunk, unembedding = _vocabulary(load)
    early = gradients if load.num_parts > 1 else unembedding
    frozen, copies = _gathered_frozen(load), _copies(load)
    rest = [*_at_rest(load), *_gathered(load)]
    moments = {
        "loss": [*rest, kept, copies, rows, frozen, chunk, unembedding],
        "backward": [*rest, kept, block, copies, rows, early],
        "first block": [*rest, gradients, _embedding_gradient(load), block, rows],
        "optimizer": [*rest, gradients, _optimizer_workspace(load), _left_rows(load)],
    }
    leaves = load.offload and load.on_gpu  # on a CPU it is the same memory
    accounts = [
        Memory(
            moment=moment,
            parts=tuple(p for p in parts if p.num_bytes and not (leaves and p.name in RESTING)),
            host_bytes=sum(p.num_bytes for p in parts if leaves and p.name in RESTING),
        )
        for moment, parts in moments.items()
    ]
    return max(accounts, key=lambda memory: memory.num_bytes)


def _at_rest(load: LearnerLoad) -> list[MemoryPart]:
    """Between two steps: float32 weights and moments, a part of each on every rank of a shard."""
    student, shards = load.student, load.shard_ranks
    # Muon keeps one moment of each matrix (an adapter's factors are all matrices), AdamW two.
    matrices = load.num_adapter or student.num_matrix_parameters
    states = 2 * load.num_learning - (matrices if load.optimizer == "muon" else 0)
    sharing = "learner.shard_ranks, learner.offload"
    actions = student.vocabulary * load.action_columns * FLOAT32 / shards
    teacher = student.vocabulary * load.teacher_columns * load.teacher_number_bytes / shards
    return [
        MemoryPart(name="weights", num_bytes=FLOAT32 * load.num_held / shards, lowered_by=sharing),
        MemoryPart(
            name="optimizer state",
            num_bytes=FLOAT32 * states / shards,
            lowered_by=f"{sharing}, an optimizer of type muon, distill.update.type=lora",
        ),
        MemoryPart(
            name="action embeddings", num_bytes=actions, lowered_by="distill.action_dimension"
        ),
        MemoryPart(
            name="teacher unembedding",
            num_bytes=teacher,
            lowered_by="scoring.dtype=bfloat16, learner.shard_ranks",
        ),
    ]


def _gathered(load: LearnerLoad) -> list[MemoryPart]:
    """What ranks of a shard bring together: two blocks at a time; the rest for a whole step."""
    if not load.is_wrapped:
        return []
    number, student = load.arithmetic.num_bytes, load.student
    blocks = 2 * number * student.num_block_parameters
    ends = number * student.num_embedding_parameters
    # A block's gradient is brought into float32 before it is summed and given back.
    reduced = FLOAT32 * student.num_block_parameters * (not load.num_adapter)
    return [
        MemoryPart(name="gathered blocks", num_bytes=blocks + reduced),
        MemoryPart(name="gathered embeddings", num_bytes=ends),
    ]


def _gathered_frozen(load: LearnerLoad) -> MemoryPart:
    """The teacher's matrices, whole, while the loss is made."""
    of_token = load.action_columns * FLOAT32 + load.teacher_columns * load.teacher_number_bytes
    elsewhere = 1.0 - 1.0 / load.shard_ranks
    return MemoryPart(
        name="gathered frozen matrices",
        num_bytes=elsewhere * load.student.vocabulary * of_token,
        lowered_by="distill.action_dimension, scoring.dtype=bfloat16",
    )


def _copies(load: LearnerLoad) -> MemoryPart:
    """Autocast's: kept by the layers that multiplied by them, or made again with their block; the
    unembedding's is made where it is read."""
    student = load.student
    copied = student.num_parameters
    if load.checkpointing:
        copied = student.num_embedding_parameters + 2 * student.num_block_parameters
    casts = load.arithmetic is Arithmetic.AUTOCAST
    return MemoryPart(
        name="bfloat16 copies of the weights",
        num_bytes=float(BFLOAT16 * copied * casts),
        lowered_by="learner.activation_checkpointing",
    )


def _activations(load: LearnerLoad) -> MemoryPart:
    return MemoryPart(
        name="activations",
        num_bytes=load.part_tokens * activation_bytes_per_token(load.student, load.reading),
        lowered_by="learner.max_tokens_per_microbatch, learner.activation_checkpointing",
    )


def _block(load: LearnerLoad) -> MemoryPart:
    return MemoryPart(
        name="backward of a block",
        num_bytes=load.part_tokens * backward_bytes_per_token(load.student, load.reading),
        lowered_by="learner.max_tokens_per_microbatch",
    )


def _rows(load: LearnerLoad) -> MemoryPart:
    """Of all response tokens of the step: hidden rows as read, in order, and their gradient; the
    teacher's features, as unit rows too; four of the action columns' size, the teacher's and the
    student's expectation, the critic's answer and a gradient."""
    hidden = 3 * load.student.row_size
    features = (1.5 if load.softmax_reads else 1.0) * load.feature_columns
    actions = 4 * load.action_columns if load.softmax_reads else 0
    fewer = "distill.student_prompts_per_step, distill.teacher_prompts_per_step, more ranks"
    return MemoryPart(
        name="rows of the step",
        num_bytes=float(FLOAT32 * load.step_tokens * (hidden + features + actions)),
        lowered_by=fewer,
    )


def _left_rows(load: LearnerLoad) -> MemoryPart:
    """Of these, what stays until the step is over: the hidden rows and the teacher's."""
    columns = 2 * load.student.row_size + load.feature_columns + load.action_columns
    return MemoryPart(
        name="rows of the step", num_bytes=float(FLOAT32 * load.step_tokens * columns)
    )


def _vocabulary(load: LearnerLoad) -> list[MemoryPart]:
    """A chunk's logits, and the unembedding's gradients: one of each stream that is read."""
    tokens = min(load.chunk_tokens, load.step_tokens)
    copies = 2.0 if load.softmax_reads else 1.0 + bool(load.teacher_columns)
    copies += 0.5 * (load.arithmetic is not Arithmetic.FLOAT32)
    # Elementwise work sees a few rows of a chunk at a time: a softmax in place, or a loss with
    # autograd, which makes about six temporaries.
    elements = min(2**24 if load.on_gpu else 2**20, tokens * load.student.vocabulary)
    blocks = (6 if load.token_sums else 2) * FLOAT32 * elements
    streams = 0 if load.num_adapter else max(1, load.softmax_reads + load.token_sums)
    return [
        MemoryPart(
            name="chunk over the vocabulary",
            num_bytes=copies * FLOAT32 * tokens * load.student.vocabulary + blocks,
            lowered_by="learner.vocabulary_chunk_tokens",
        ),
        MemoryPart(
            name="gradients of the unembedding",
            num_bytes=streams * FLOAT32 * load.student.vocabulary * load.student.row_size,
        ),
    ]


def _gradients(load: LearnerLoad) -> MemoryPart:
    return MemoryPart(
        name="gradients",
        num_bytes=FLOAT32 * load.num_learning / load.shard_ranks,
        lowered_by="learner.shard_ranks, learner.offload, distill.update.type=lora",
    )


def _embedding_gradient(load: LearnerLoad) -> MemoryPart:
    """The input embeddings' is as large as they are, and joins the unembedding's if tied."""
    student = load.student
    held = 0 if load.num_adapter else student.vocabulary * student.embedding_size
    return MemoryPart(name="gradient of the embeddings", num_bytes=FLOAT32 * float(held))


def _optimizer_workspace(load: LearnerLoad) -> MemoryPart:
    """On a GPU AdamW updates all weights at once and makes one more of each on the way; on a CPU
    one matrix after another, the embeddings being the largest."""
    student = load.student
    at_once = float(load.num_learning) / load.shard_ranks
    if not load.on_gpu or load.offload:
        largest = student.vocabulary * max(student.row_size, student.embedding_size)
        at_once = min(at_once, 2.0 * largest / load.shard_ranks)
    return MemoryPart(name="optimizer's workspace", num_bytes=FLOAT32 * at_once)
