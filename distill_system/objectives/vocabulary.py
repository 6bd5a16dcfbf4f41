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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class VocabularyRows:
    """What is kept of a policy's distribution at each token.

    logprobs_N: float32, log pi(y_t | s_t) in nats of the tokens that were written.
    expected_embedding_NE: float32, sum over y of pi(y | s_t) e(y).
    """

    logprobs_N: Tensor
    expected_embedding_NE: Tensor


@dataclass(frozen=True, slots=True)
class VocabularySum:
    """A weighted sum of token losses.

    total: scalar, with graph to hidden states and unembedding.
    values_N: float32, the token losses, detached.
    logprobs_N: float32, log pi_theta(y_t | s_t) at temperature 1, detached.
    """

    total: Tensor
    values_N: Tensor
    logprobs_N: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyChunk:
    """Both policies' whole distributions at a few tokens; it must not be kept.

    student_logprobs_cV: float32 log pi_theta(. | s_t), with graph.
    teacher_logprobs_cV: float32 log pi*(. | s_t), made only when asked for.
    token_ids_c: int64, the tokens written. rows: which rows of the stream these are.
    """

    student_logprobs_cV: Tensor
    token_ids_c: Tensor
    rows: slice
    read_teacher: Callable[[], Tensor]

    @property
    def teacher_logprobs_cV(self) -> Tensor:
        """Made anew at each call: keep it in a name of your own."""
        return self.read_teacher()

    @property
    def written_logprobs_c(self) -> Tensor:
        """log pi_theta(y_t | s_t) of the tokens written, with graph."""
        return self.student_logprobs_cV.gather(1, self.token_ids_c[:, None]).squeeze(1)


ChunkLoss = Callable[[VocabularyChunk], Tensor]
"""Per-token losses of a chunk, float32 [c], with graph to student_logprobs_cV alone."""


def unit_rows(matrix: Tensor) -> Tensor:
    """Each row divided by its Euclidean norm, float32; a zero row stays zero.

    Shapes: matrix [..., D]; returns float32 [..., D].
    """
    return torch.nn.functional.normalize(matrix.float(), dim=-1)


def read_vocabulary(
    hidden_NH: Tensor,
    token_ids_N: Tensor,
    unembedding_VH: Tensor,
    action_embeddings_VE: Tensor,
    *,
    chunk_tokens: int,
) -> VocabularyRows:
    """Read a policy's softmax once: the written tokens' logprobs and the expected embedding.

    The expectation of a critic that is linear in the action embedding needs no more than this:
    E_{y ~ pi} h^T phi e(y) = h^T phi (sum_y pi(y) e(y)), exact, not top-k.

    Shapes: hidden_NH [N, H]; token_ids_N int64 [N]; unembedding_VH [V, H];
        action_embeddings_VE [V, E]. Gradients flow to hidden_NH and unembedding_VH.
    Memory: a few chunk_tokens x V float32 at once, in forward and in backward.
    """
    dtype = _multiplication_dtype(hidden_NH)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        logprobs_N, expected_NE = _Read.apply(  # type: ignore[no-untyped-call]  # torch types no Function
            hidden_NH, unembedding_VH, token_ids_N, action_embeddings_VE, chunk_tokens, dtype
        )
    return VocabularyRows(logprobs_N, expected_NE)


def sum_over_vocabulary(
    hidden_NH: Tensor,
    token_ids_N: Tensor,
    unembedding_VH: Tensor,
    weights_N: Tensor,
    chunk_loss: ChunkLoss,
    *,
    teacher: TeacherDistribution | None = None,
    temperature: float = 1.0,
    chunk_tokens: int,
) -> VocabularySum:
    """sum_t w_t loss_t, and the losses themselves; the gradient is made in the forward pass.

    Shapes: hidden_NH [N, H]; token_ids_N int64 [N]; unembedding_VH [V, H]; weights_N float32 [N],
        without graph.
    Memory: what chunk_loss keeps of a chunk, and one gradient of the unembedding. The scalar may be
        differentiated once.
    """
    dtype = _multiplication_dtype(hidden_NH)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        logprobs_N = torch.empty(token_ids_N.shape, device=hidden_NH.device)

        def read_chunk(logits_cV: Tensor, rows: slice) -> Tensor:
            written_c1 = logits_cV.detach().gather(1, token_ids_N[rows, None])
            logprobs_N[rows] = written_c1.squeeze(1) - logits_cV.detach().logsumexp(dim=-1)
            return chunk_loss(_make_chunk(logits_cV, token_ids_N[rows], rows, teacher, temperature))

        total, values_N = _Sum.apply(  # type: ignore[no-untyped-call]  # torch types no Function
            hidden_NH, unembedding_VH, weights_N, read_chunk, chunk_tokens, dtype
        )
    return VocabularySum(total, values_N, logprobs_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherDistribution:
    """The teacher's distribution, rebuilt exactly from what travels.

    features_NF: its final hidden states. unembedding_VF: its own, frozen.
    """

    features_NF: Tensor
    unembedding_VF: Tensor

    def read(self, rows: slice, temperature: float) -> Tensor:
        """log pi*(. | s_t) at these rows, float32 [c, V]."""
        features_cF = self.features_NF[rows].to(self.unembedding_VF.dtype)
        logits_cV = (features_cF @ self.unembedding_VF.T).float()
        return _temper(logits_cV, temperature).log_softmax(dim=-1)


@torch.no_grad()
def read_top_k(
    hidden_NH: Tensor, unembedding_VH: Tensor, *, k: int, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """The k most likely tokens at each row, int64 [N, K], and their logprobs, float32 [N, K].

    Most likely first. What they leave out is 1 - sum exp(logprobs): nothing is renormalised.
    """
    ids, logprobs = [hidden_NH.new_zeros(0, k, dtype=torch.int64)], [hidden_NH.new_zeros(0, k)]
    for rows in _chunks(hidden_NH.shape[0], chunk_tokens):
        logprobs_cV = (hidden_NH[rows] @ unembedding_VH.T).float().log_softmax(dim=-1)
        best = logprobs_cV.topk(k, dim=-1)
        ids.append(best.indices)
        logprobs.append(best.values)
    return torch.cat(ids), torch.cat(logprobs).float()


class _Read(torch.autograd.Function):
    """Chunked softmax read; backward makes each chunk's logits again, and nothing else."""

    @staticmethod
    def forward(
        context: Any,
        hidden_NH: Tensor,
        unembedding_VH: Tensor,
        token_ids_N: Tensor,
        action_embeddings_VE: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        weight_VH = unembedding_VH.to(dtype)
        num_tokens = hidden_NH.shape[0]
        logprobs_N = torch.empty(num_tokens, device=hidden_NH.device)
        expected_NE = torch.empty(
            num_tokens, action_embeddings_VE.shape[1], device=hidden_NH.device
        )
        for rows in _chunks(num_tokens, chunk_tokens):
            logprobs_cV = (hidden_NH[rows].to(dtype) @ weight_VH.T).float().log_softmax(dim=-1)
            logprobs_N[rows] = logprobs_cV.gather(1, token_ids_N[rows, None]).squeeze(1)
            expected_NE[rows] = logprobs_cV.exp_() @ action_embeddings_VE
        context.save_for_backward(
            hidden_NH, unembedding_VH, token_ids_N, action_embeddings_VE, expected_NE
        )
        context.chunk_tokens, context.dtype = chunk_tokens, dtype
        return logprobs_N, expected_NE

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, unembedding_VH, token_ids_N, actions_VE, expected_NE = context.saved_tensors
        into_logprobs_N, into_expected_NE = gradients
        sums = _GradientSums(hidden_NH, unembedding_VH, context.needs_input_grad, context.dtype)
        for rows in _chunks(hidden_NH.shape[0], context.chunk_tokens):
            policy_cV = (hidden_NH[rows].to(context.dtype) @ sums.weight_VH.T).float().softmax(-1)
            # d ebar / d z = pi (e - ebar);  d log pi(y_t) / d z = 1[y = y_t] - pi
            centre_c = (into_expected_NE[rows] * expected_NE[rows]).sum(-1) + into_logprobs_N[rows]
            into_logits_cV = into_expected_NE[rows] @ actions_VE.T
            into_logits_cV.sub_(centre_c[:, None]).mul_(policy_cV)
            written = token_ids_N[rows, None]
            into_logits_cV.scatter_add_(1, written, into_logprobs_N[rows, None])
            sums.add(rows, into_logits_cV)
        return *sums.finish(), None, None, None, None


class _Sum(torch.autograd.Function):
    """Chunked weighted sum; a chunk's gradient is made by autograd while its logits are there."""

    @staticmethod
    def forward(
        context: Any,
        hidden_NH: Tensor,
        unembedding_VH: Tensor,
        weights_N: Tensor,
        read_chunk: Callable[[Tensor, slice], Tensor],
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        sums = _GradientSums(hidden_NH, unembedding_VH, context.needs_input_grad, dtype)
        values_N = torch.empty(hidden_NH.shape[0], device=hidden_NH.device)
        learns = any(context.needs_input_grad[:2])
        for rows in _chunks(hidden_NH.shape[0], chunk_tokens):
            logits_cV = (sums.hidden_NH[rows].to(dtype) @ sums.weight_VH.T).float()
            logits_cV.requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                values_c = read_chunk(logits_cV, rows)
            values_N[rows] = values_c.detach()
            if learns:
                [into_logits_cV] = torch.autograd.grad(values_c, logits_cV, weights_N[rows])
                del values_c, logits_cV
                sums.add(rows, into_logits_cV)
        context.gradients = sums.finish()
        context.mark_non_differentiable(values_N)
        return (weights_N * values_N).sum(), values_N

    @staticmethod
    @once_differentiable
    def backward(context: Any, *into: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor | None, ...] = context.gradients
        del context.gradients  # scaled in place: a second backward finds nothing to read
        scaled = (None if g is None else g.mul_(into[0]) for g in gradients)
        return *scaled, None, None, None, None


class _GradientSums:
    """Gradients of hidden states and unembedding, added up over chunks in float32."""

    def __init__(
        self,
        hidden_NH: Tensor,
        unembedding_VH: Tensor,
        needs: tuple[bool, ...],
        dtype: torch.dtype,
    ) -> None:
        self.hidden_NH = hidden_NH.detach()
        self.weight_VH = unembedding_VH.detach().to(dtype)
        self.dtype = dtype
        self.hidden_dtype, self.unembedding_dtype = hidden_NH.dtype, unembedding_VH.dtype
        self.into_hidden_NH = torch.zeros_like(hidden_NH) if needs[0] else None
        self.into_unembedding_VH = (
            torch.zeros_like(unembedding_VH, dtype=torch.float32) if needs[1] else None
        )

    def add(self, rows: slice, into_logits_cV: Tensor) -> None:
        """Take in one chunk's gradient of the logits."""
        into_cV = into_logits_cV.to(self.dtype)
        if self.into_hidden_NH is not None:
            self.into_hidden_NH[rows] = (into_cV @ self.weight_VH).to(self.hidden_dtype)
        if self.into_unembedding_VH is not None:
            hidden_cH = self.hidden_NH[rows].to(self.dtype)
            if self.dtype is torch.float32:
                self.into_unembedding_VH.addmm_(into_cV.T, hidden_cH)
            else:
                self.into_unembedding_VH += into_cV.T @ hidden_cH

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of hidden states and of the unembedding, each in its tensor's dtype."""
        unembedding = self.into_unembedding_VH
        return (
            self.into_hidden_NH,
            None if unembedding is None else unembedding.to(self.unembedding_dtype),
        )


def _make_chunk(
    logits_cV: Tensor,
    token_ids_c: Tensor,
    rows: slice,
    teacher: TeacherDistribution | None,
    temperature: float,
) -> VocabularyChunk:
    def read_teacher() -> Tensor:
        assert teacher is not None, "the objective declares that it needs the teacher's features"
        with torch.no_grad():
            return teacher.read(rows, temperature)

    return VocabularyChunk(
        student_logprobs_cV=_temper(logits_cV, temperature).log_softmax(dim=-1),
        token_ids_c=token_ids_c,
        rows=rows,
        read_teacher=read_teacher,
    )


def _temper(logits_cV: Tensor, temperature: float) -> Tensor:
    return logits_cV if temperature == 1.0 else logits_cV / temperature


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, min(start + chunk_tokens, num_tokens))


def _multiplication_dtype(hidden_NH: Tensor) -> torch.dtype:
    """What autocast would multiply in: autocast itself does not reach into these functions."""
    kind = hidden_NH.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NH.dtype
