"""The seam between the learner and an objective: flat token rows in, a loss share out.

Axes: N response tokens of one stream on this rank, H student hidden size, F teacher feature size,
E action-embedding size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from distill_system.config.objective.needs import StreamName, WeighsStreams
from distill_system.objectives.vocabulary import (
    ChunkLoss,
    ChunkWeights,
    TeacherDistribution,
    VocabularyRows,
    VocabularySum,
    read_vocabulary,
    sum_over_vocabulary,
)

SumOverRanks = Callable[[Tensor], Tensor]
"""Sums a tensor over all learner ranks; the identity on one rank. Not differentiated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRows:
    """The teacher's reading of the same tokens, float32; None where the objective needs it not.

    features_NF: its final hidden states. expected_embedding_NE: sum_y pi*(y | s) e(y).
    logprobs_N: log pi*(y_t | s_t), nats.
    top_k_ids_NK: int64, its most likely tokens, with top_k_logprobs_NK.
    """

    features_NF: Float[Tensor, "N F"] | None = None
    expected_embedding_NE: Float[Tensor, "N E"] | None = None
    logprobs_N: Float[Tensor, " N"] | None = None
    top_k_ids_NK: Int64[Tensor, "N K"] | None = None
    top_k_logprobs_NK: Float[Tensor, "N K"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRows:
    """Which sequences of this rank answer one prompt, one better than the other.

    numbers_S: int64, the pair of each sequence, of num_pairs over all ranks; a pair may lack one of
        the two.  is_worse_S: bool, whether it is the worse one.
    """

    numbers_S: Int64[Tensor, " S"]
    is_worse_S: Bool[Tensor, " S"]
    num_pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """One stream's response tokens on this rank; the rows of a sequence are contiguous, in order.

    hidden_NH: the student's final hidden state before each token, with its graph.
    token_ids_N: int64, the tokens written. sequence_ids_N: int64, which sequence of this rank.
    positions_N: int64, t = 0, 1, ... within the response.
    num_global_tokens: tokens of this stream over all ranks, the only denominator.
    num_global_sequences: sequences of this stream over all ranks.
    teacher: None where the objective asks nothing of the teacher.
    pairs: None of text that is no half of a pair.
    behaviour_logprobs_N: float32, nats, what the writer said of each token as it was sampled, at
        behaviour_temperature; None where the text is taken to be the current student's own.
    behaviour_kept_NK: int32, of which tokens each was sampled, -1 where there are fewer; None: of
        the whole vocabulary.
    """

    hidden_NH: Float[Tensor, "N H"]
    token_ids_N: Int64[Tensor, " N"]
    sequence_ids_N: Int64[Tensor, " N"]
    positions_N: Int64[Tensor, " N"]
    num_global_tokens: int
    num_global_sequences: int
    teacher: TeacherRows | None = None
    pairs: PairRows | None = None
    behaviour_logprobs_N: Float[Tensor, " N"] | None = None
    behaviour_temperature: float = 1.0
    behaviour_kept_NK: Int32[Tensor, "N K"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyHeads:
    """Both policies' unembeddings and the frozen action embeddings, read in chunks.

    unembedding_VH: the student's own, with gradient. action_embeddings_VE: float32, unit rows.
    teacher_unembedding_VF: None where the objective needs no teacher distribution. logit_cap,
        teacher_logit_cap: c where a model's logits z become c tanh(z / c), else None.
    """

    unembedding_VH: Float[Tensor, "V H"]
    action_embeddings_VE: Float[Tensor, "V E"]
    chunk_tokens: int
    teacher_unembedding_VF: Float[Tensor, "V F"] | None = None
    logit_cap: float | None = None
    teacher_logit_cap: float | None = None

    def read(self, rows: TokenRows) -> VocabularyRows:
        """Log-probabilities and expected embeddings of the student at each row, with graph."""
        return read_vocabulary(
            rows.hidden_NH,
            rows.token_ids_N,
            self.unembedding_VH,
            self.action_embeddings_VE,
            chunk_tokens=self.chunk_tokens,
            behaviour_temperature=rows.behaviour_temperature,
            behaviour_kept_NK=rows.behaviour_kept_NK,
            logit_cap=self.logit_cap,
        )

    def read_written(self, rows: TokenRows) -> VocabularyRows:
        """As read, of the tokens written alone: expected embeddings have no columns."""
        return replace(self, action_embeddings_VE=self.action_embeddings_VE[:, :0]).read(rows)

    def sum(
        self,
        rows: TokenRows,
        chunk_loss: ChunkLoss,
        weights_N: Float[Tensor, " N"],
        *,
        chunk_weights: ChunkWeights | None = None,
        temperature: float = 1.0,
        tokens_together: int = 1,
    ) -> VocabularySum:
        """sum_t w_t loss_t with graph, and the losses, detached [N]; see sum_over_vocabulary."""
        return sum_over_vocabulary(
            rows.hidden_NH,
            rows.token_ids_N,
            self.unembedding_VH,
            weights_N,
            chunk_loss,
            teacher=self._teacher(rows),
            chunk_weights=chunk_weights,
            temperature=temperature,
            behaviour_temperature=rows.behaviour_temperature,
            behaviour_kept_NK=rows.behaviour_kept_NK,
            tokens_together=tokens_together,
            chunk_tokens=self.chunk_tokens,
            logit_cap=self.logit_cap,
        )

    def _teacher(self, rows: TokenRows) -> TeacherDistribution | None:
        if self.teacher_unembedding_VF is None or rows.teacher is None:
            return None
        if rows.teacher.features_NF is None:
            return None
        return TeacherDistribution(
            features_NF=rows.teacher.features_NF,
            unembedding_VF=self.teacher_unembedding_VF,
            logit_cap=self.teacher_logit_cap,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveOutput:
    """What an objective hands back.

    loss_share: scalar with graph; the sum over ranks is the loss.
    metric_shares: scalars whose sum over ranks is the metric. metrics: the same on every rank.
    student_logprobs_N: detached log pi(y_t | s_t) of the on-policy rows at their
        behaviour_temperature, among the tokens kept there; None without such rows.
    """

    loss_share: Float32[Tensor, ""]
    metric_shares: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    student_logprobs_N: Float[Tensor, " N"] | None = None


@runtime_checkable
class Objective(Protocol):
    """One training objective. Its state is what a checkpoint must hold."""

    def compute_loss(
        self,
        heads: PolicyHeads,
        off_policy: TokenRows | None,
        on_policy: TokenRows | None,
        sum_over_ranks: SumOverRanks,
    ) -> ObjectiveOutput:
        """Play the critic up on these rows, then return the student's loss against it."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that the next step depends on; empty for a stateless objective."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what state_dict gave."""


def stream_weights(
    config: WeighsStreams, off_policy: TokenRows | None, on_policy: TokenRows | None
) -> dict[StreamName, tuple[TokenRows, float]]:
    """The streams of this step that the configuration reads, each with its weight, 1 if alone."""
    here: dict[StreamName, TokenRows | None] = {"off_policy": off_policy, "on_policy": on_policy}
    read = {name: rows for name, rows in here.items() if rows is not None and config.reads(name)}
    assert read, "the driver brings every stream that the configuration reads, or one of them"
    alone = len(read) == 1
    return {name: (rows, 1.0 if alone else config.weight(name)) for name, rows in read.items()}


def stream_mean(values_N: Float[Tensor, " N"], rows: TokenRows) -> Float[Tensor, ""]:
    """This rank's share of a mean over all response tokens of the stream."""
    return values_N.sum() / rows.num_global_tokens


def weigh(
    values: Float[Tensor, "N ..."], weights_N: Float[Tensor, " N"] | None
) -> Float[Tensor, "N ..."]:
    """values [N] or [N, X], each row times its weight; None leaves them as they are."""
    if weights_N is None:
        return values
    return values * weights_N.reshape(-1, *[1] * (values.dim() - 1))


def pad_rows(values_N: Float[Tensor, " N"], rows: TokenRows) -> Float[Tensor, "S T"]:
    """Flat rows as a grid, one line a sequence, zeros behind each response.

    Shapes: values_N [N]; returns [S, T], S sequences of this rank, T its longest response.
    """
    num_sequences = int(rows.sequence_ids_N.max()) + 1 if values_N.numel() else 0
    longest = int(rows.positions_N.max()) + 1 if values_N.numel() else 0
    # index assignment keeps the graph of values_N
    grid_ST = torch.zeros(num_sequences, longest, dtype=values_N.dtype, device=values_N.device)
    grid_ST[rows.sequence_ids_N, rows.positions_N] = values_N
    return grid_ST
