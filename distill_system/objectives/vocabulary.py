"""Everything that needs a row over the whole vocabulary, made a chunk of tokens at a time.

Hidden states in -> per-token numbers out; no tensor of tokens x vocabulary outlives its chunk, in
forward or in backward, of the student or of the teacher. Casts happen inside the chunk.

Two reads: `read_vocabulary` gives numbers that a gradient may flow back through, at the price of
the chunk's logits made twice; `sum_over_vocabulary` adds up a loss whose weights are known before,
makes its gradient while the chunk is there, and makes nothing twice.

Axes: N response tokens, c tokens of a chunk, H student hidden size, F teacher hidden size,
V vocabulary, E action-embedding size, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_system.objectives.chunked_products import (
    UnembeddingGradients,
    block_slices,
    cap_logits,
    chunk_slices,
    multiplication_dtype,
    multiply,
    uncap_gradient,
)
from distill_system.objectives.softmax_read import SoftmaxRead, read_written, temper


@dataclass(frozen=True, slots=True)
class VocabularyRows:
    """What is kept of a policy's distribution at each token.

    logprobs_N: float32, log pi(y_t | s_t) in nats of the tokens that were written.
    expected_embedding_NE: float32, sum over y of pi(y | s_t) e(y).
    behaviour_logprobs_N: logprobs_N as the text was sampled, at its temperature and among what
        truncation left, detached.
    """

    logprobs_N: Float32[Tensor, " N"]
    expected_embedding_NE: Float32[Tensor, "N E"]
    behaviour_logprobs_N: Float32[Tensor, " N"]


@dataclass(frozen=True, slots=True)
class VocabularySum:
    """A weighted sum of token losses.

    total: scalar, with graph to hidden states and unembedding.
    values_N: float32, the token losses, detached and unweighted.
    logprobs_N: float32, log pi_theta(y_t | s_t) as the text was sampled, at its temperature and
        among what truncation left.
    """

    total: Float32[Tensor, ""]
    values_N: Float32[Tensor, " N"]
    logprobs_N: Float32[Tensor, " N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyChunk:
    """Both policies' whole distributions at a few tokens; it must not be kept.

    student_logprobs_cV: float32 log pi_theta(. | s_t), with graph.
    teacher_logprobs_cV: float32 log pi*(. | s_t), made only when asked for.
    token_ids_c: int64, the tokens written. rows: which rows of the stream these are.
    """

    student_logprobs_cV: Float32[Tensor, "c V"]
    token_ids_c: Int64[Tensor, " c"]
    rows: slice
    read_teacher: Callable[[], Tensor]

    @property
    def teacher_logprobs_cV(self) -> Float32[Tensor, "c V"]:  # noqa: N802  # tensors end in their axes
        """Made anew at each call: keep it in a name of your own."""
        return self.read_teacher()

    @property
    def written_logprobs_c(self) -> Float32[Tensor, " c"]:
        """log pi_theta(y_t | s_t) of the tokens written, with graph."""
        return self.student_logprobs_cV.gather(1, self.token_ids_c[:, None]).squeeze(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherDistribution:
    """The teacher's distribution, rebuilt exactly from what travels.

    features_NF: its final hidden states. unembedding_VF: its own, frozen. logit_cap: its own.
    """

    features_NF: Float[Tensor, "N F"]
    unembedding_VF: Float[Tensor, "V F"]
    logit_cap: float | None = None

    def make_logits(self, rows: slice) -> Float32[Tensor, "c V"]:
        """Logits at these rows, float32 [c, V]."""
        features_cF = self.features_NF[rows].to(self.unembedding_VF.dtype)
        return cap_logits(multiply(features_cF, self.unembedding_VF.T), self.logit_cap)


ChunkLoss = Callable[[VocabularyChunk], Tensor]
"""Per-token losses of a chunk, float32 [c], with graph to student_logprobs_cV alone."""

ChunkWeights = Callable[[slice, Tensor], Tensor]
"""Factors of the weights of these rows, float32 [c], from the student's log-probabilities of the
tokens written; called once for all rows, in order, a few at a time."""


def unit_rows(matrix: Float[Tensor, "*rows D"]) -> Float32[Tensor, "*rows D"]:
    """Each row divided by its Euclidean norm, float32; a zero row stays zero.

    Shapes: matrix [..., D]; returns float32 [..., D].
    """
    return torch.nn.functional.normalize(matrix.float(), dim=-1)


def read_vocabulary(
    hidden_NH: Float[Tensor, "N H"],
    token_ids_N: Int64[Tensor, " N"],
    unembedding_VH: Float[Tensor, "V H"],
    action_embeddings_VE: Float[Tensor, "V E"],
    *,
    chunk_tokens: int,
    behaviour_temperature: float = 1.0,
    behaviour_kept_NK: Int32[Tensor, "N K"] | None = None,
    logit_cap: float | None = None,
) -> VocabularyRows:
    """Read a policy's softmax once: the written tokens' logprobs and the expected embedding.

    The expectation of a critic that is linear in the action embedding needs no more than this:
    E_{y ~ pi} h^T phi e(y) = h^T phi (sum_y pi(y) e(y)), exact, not top-k.

    Shapes: hidden_NH [N, H]; token_ids_N int64 [N]; unembedding_VH [V, H];
        action_embeddings_VE [V, E]. Gradients flow to hidden_NH and unembedding_VH. Logits z are
        logit_cap tanh(z / logit_cap), before any temperature; None: z.
    Memory: one chunk_tokens x V float32 in forward, two in backward.
    """
    # Autocast does not see into an autograd.Function: its dtype is asked for here, then it is off.
    dtype = multiplication_dtype(hidden_NH)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        logprobs_N, expected_NE, tempered_N = SoftmaxRead.apply(  # type: ignore[no-untyped-call]  # torch types no Function
            hidden_NH,
            unembedding_VH,
            token_ids_N,
            action_embeddings_VE,
            chunk_tokens,
            dtype,
            behaviour_temperature,
            behaviour_kept_NK,
            logit_cap,
        )
    behaviour_N = logprobs_N.detach() if tempered_N is None else tempered_N
    return VocabularyRows(logprobs_N, expected_NE, behaviour_N)


def sum_over_vocabulary(
    hidden_NH: Float[Tensor, "N H"],
    token_ids_N: Int64[Tensor, " N"],
    unembedding_VH: Float[Tensor, "V H"],
    weights_N: Float[Tensor, " N"],
    chunk_loss: ChunkLoss,
    *,
    teacher: TeacherDistribution | None = None,
    chunk_weights: ChunkWeights | None = None,
    temperature: float = 1.0,
    behaviour_temperature: float = 1.0,
    behaviour_kept_NK: Int32[Tensor, "N K"] | None = None,
    tokens_together: int = 1,
    chunk_tokens: int,
    logit_cap: float | None = None,
) -> VocabularySum:
    """sum_t w_t loss_t, and the losses themselves; the gradient is made in the forward pass.

    Shapes: hidden_NH [N, H]; token_ids_N int64 [N]; unembedding_VH [V, H]; weights_N float32 [N],
        without graph. chunk_loss sees few tokens at a time, in whole multiples of tokens_together
        (but for the last ones): those whose losses depend on one another. chunk_weights multiplies
        weights_N by what only the chunk's log-probabilities tell. logit_cap: as read_vocabulary's.
    Memory: one chunk_tokens x V float32, a second with a teacher, and one gradient of the
        unembedding. The scalar may be differentiated once.
    """
    assert not weights_N.requires_grad, "no gradient flows through the weights: detach them"
    dtype = multiplication_dtype(hidden_NH)
    learns = torch.is_grad_enabled()
    needs = (learns and hidden_NH.requires_grad, learns and unembedding_VH.requires_grad)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        sums = UnembeddingGradients(
            hidden_NH, unembedding_VH, needs=needs, dtype=dtype, cap=logit_cap
        )
        losses = _TokenLosses(
            token_ids_N,
            weights_N,
            chunk_loss,
            teacher,
            chunk_weights,
            temperature=temperature,
            behaviour_temperature=behaviour_temperature,
            behaviour_kept_NK=behaviour_kept_NK,
            tokens_together=tokens_together,
            logit_cap=logit_cap,
        )
        total = _Sum.apply(  # type: ignore[no-untyped-call]  # torch types no Function
            hidden_NH, unembedding_VH, sums, losses, chunk_tokens
        )
    return VocabularySum(total, losses.values_N, losses.logprobs_N)


@torch.no_grad()
def read_top_k(
    hidden_NH: Float[Tensor, "N H"],
    unembedding_VH: Float[Tensor, "V H"],
    *,
    k: int,
    chunk_tokens: int,
    logit_cap: float | None = None,
) -> tuple[Int64[Tensor, "N K"], Float32[Tensor, "N K"]]:
    """The k most likely tokens at each row, int64 [N, K], and their logprobs, float32 [N, K].

    Most likely first. What they leave out is 1 - sum exp(logprobs): nothing is renormalised.
    """
    ids, logprobs = [hidden_NH.new_zeros(0, k, dtype=torch.int64)], [hidden_NH.new_zeros(0, k)]
    for rows in chunk_slices(hidden_NH.shape[0], chunk_tokens):
        logits_cV = cap_logits((hidden_NH[rows] @ unembedding_VH.T).float(), logit_cap)
        logprobs_cV = logits_cV.log_softmax(dim=-1)
        best = logprobs_cV.topk(k, dim=-1)
        ids.append(best.indices)
        logprobs.append(best.values)
    return torch.cat(ids), torch.cat(logprobs).float()


class _Sum(torch.autograd.Function):
    """Chunked weighted sum; a chunk's gradient is made by autograd while its logits are there."""

    @staticmethod
    def forward(
        context: Any,
        hidden_NH: Tensor,
        unembedding_VH: Tensor,
        sums: UnembeddingGradients,
        losses: _TokenLosses,
        chunk_tokens: int,
    ) -> Tensor:
        for rows in chunk_slices(hidden_NH.shape[0], chunk_tokens, losses.tokens_together):
            logits_cV = sums.make_logits(rows)
            losses.read(logits_cV, rows, learns=sums.needed)
            if sums.needed:
                sums.add(rows, logits_cV)
            del logits_cV  # before the next chunk's are made
        context.gradients = sums.finish()
        return (losses.weights_N * losses.values_N).sum()

    @staticmethod
    @once_differentiable
    def backward(context: Any, *into: Tensor) -> tuple[Tensor | None, ...]:
        assert context.gradients is not None, (
            "the sum's gradient was made in the forward pass and given away: "
            "it may be differentiated once"
        )
        gradients, context.gradients = context.gradients, None
        scaled = (None if g is None else g.mul_(into[0]) for g in gradients)
        return *scaled, None, None, None


class _TokenLosses:
    """The losses of all tokens, filled in chunk by chunk, and the gradients of their logits."""

    def __init__(
        self,
        token_ids_N: Tensor,
        weights_N: Tensor,
        chunk_loss: ChunkLoss,
        teacher: TeacherDistribution | None,
        chunk_weights: ChunkWeights | None,
        *,
        temperature: float,
        behaviour_temperature: float,
        behaviour_kept_NK: Tensor | None,
        tokens_together: int,
        logit_cap: float | None,
    ) -> None:
        self.logit_cap = logit_cap
        self.token_ids_N, self.chunk_weights = token_ids_N, chunk_weights
        self.weights_N = weights_N if chunk_weights is None else weights_N.clone()
        self.tokens_together = tokens_together
        self.chunk_loss, self.teacher = chunk_loss, teacher
        self.temperature, self.behaviour_temperature = temperature, behaviour_temperature
        self.kept_NK = behaviour_kept_NK
        self.values_N = torch.empty(token_ids_N.shape, device=token_ids_N.device)
        self.logprobs_N = torch.empty_like(self.values_N)

    def read(self, logits_cV: Tensor, rows: slice, *, learns: bool) -> None:
        """Fill in these rows' losses; if learning, their logits become their gradient in place."""
        teacher = _TeacherChunk(self.teacher, rows, self.temperature)
        for block in block_slices(logits_cV, self.tokens_together):
            tokens = slice(rows.start + block.start, rows.start + block.stop)
            logits_bV = logits_cV[block].detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                values_b = self._losses(logits_bV, tokens, partial(teacher.read, block))
            self.values_N[tokens] = values_b.detach()
            # after the losses: the weights follow from log-probabilities that they have just read
            if self.chunk_weights is not None:
                self.weights_N[tokens] *= self.chunk_weights(tokens, self.logprobs_N[tokens])
            if learns:
                # Inside a Function's forward, autograd records nothing but what it is told to: this
                # graph is the block's own and ends at its logits, whose memory takes the gradient.
                [into_bV] = torch.autograd.grad(values_b, logits_bV, self.weights_N[tokens])
                logits_cV[block] = uncap_gradient(into_bV, logits_bV.detach(), self.logit_cap)

    def _losses(
        self, logits_bV: Tensor, tokens: slice, read_teacher: Callable[[], Tensor]
    ) -> Tensor:
        chunk = VocabularyChunk(
            student_logprobs_cV=temper(logits_bV, self.temperature).log_softmax(dim=-1),
            token_ids_c=self.token_ids_N[tokens],
            rows=tokens,
            read_teacher=read_teacher,
        )
        self.logprobs_N[tokens] = self._behaviour_logprobs(logits_bV.detach(), tokens, chunk)
        return self.chunk_loss(chunk)

    def _behaviour_logprobs(
        self, logits_bV: Tensor, tokens: slice, chunk: VocabularyChunk
    ) -> Tensor:
        if self.temperature == self.behaviour_temperature and self.kept_NK is None:
            return chunk.written_logprobs_c.detach()
        kept_bK = None if self.kept_NK is None else self.kept_NK[tokens]
        return read_written(logits_bV, chunk.token_ids_c, self.behaviour_temperature, kept_bK)


class _TeacherChunk:
    """The teacher's logits of one chunk, made when a loss first asks for them."""

    def __init__(
        self, teacher: TeacherDistribution | None, rows: slice, temperature: float
    ) -> None:
        self.teacher, self.rows, self.temperature = teacher, rows, temperature
        self.logits_cV: Tensor | None = None

    @torch.no_grad()
    def read(self, block: slice) -> Tensor:
        """log pi* of these rows of the chunk, float32 [b, V]."""
        if self.logits_cV is None:
            assert self.teacher is not None, "the objective declares that it needs the features"
            self.logits_cV = self.teacher.make_logits(self.rows)
        return temper(self.logits_cV[block], self.temperature).log_softmax(dim=-1)
