"""The autograd function behind `read_vocabulary`: a policy's softmax, read a chunk at a time.

Axes: N response tokens, c tokens of a chunk, b tokens of a block, H hidden size, V vocabulary,
E action-embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_system.objectives.chunked_products import (
    UnembeddingGradients,
    block_slices,
    chunk_slices,
    multiply,
    probability_dtype,
    uncap_gradient,
)


class SoftmaxRead(torch.autograd.Function):
    """Logprobs and expected embeddings; backward makes each chunk's logits again, no more."""

    @staticmethod
    def forward(
        context: Any,
        hidden_NH: Tensor,
        unembedding_VH: Tensor,
        token_ids_N: Tensor,
        action_embeddings_VE: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
        behaviour_temperature: float,
        behaviour_kept_NK: Tensor | None,
        cap: float | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """float32 [N], [N, E] and [N]; dtype is what to multiply in, cap that of the logits.

        The third are the log-probabilities at behaviour_temperature among the tokens of
        behaviour_kept_NK; None where they are the first.
        """
        student = UnembeddingGradients(
            hidden_NH, unembedding_VH, needs=(False, False), dtype=dtype, cap=cap
        )
        # Softmax and sums in float32, products of probabilities in the lower precision where that
        # has float32's range.
        actions_VE = action_embeddings_VE.to(probability_dtype(dtype))
        logprobs_N = torch.empty(token_ids_N.shape, device=hidden_NH.device)
        expected_NE = logprobs_N.new_empty(*token_ids_N.shape, actions_VE.shape[1])
        same = behaviour_temperature == 1.0 and behaviour_kept_NK is None
        tempered_N = None if same else torch.empty_like(logprobs_N)
        for rows in chunk_slices(hidden_NH.shape[0], chunk_tokens):
            policy_cV = student.make_logits(rows)
            if tempered_N is not None:
                kept_cK = None if behaviour_kept_NK is None else behaviour_kept_NK[rows]
                how = (behaviour_temperature, kept_cK)
                _read_blocks(policy_cV, token_ids_N[rows], *how, tempered_N[rows])
            _normalise_in_place(policy_cV, token_ids_N[rows], logprobs_N[rows])
            expected_NE[rows] = multiply(policy_cV.to(actions_VE.dtype), actions_VE)
        context.save_for_backward(
            hidden_NH, unembedding_VH, token_ids_N, action_embeddings_VE, expected_NE
        )
        # No logits are kept: those of 1024 tokens and 152k words are 600 MB, and one product makes
        # them again.
        context.chunk_tokens, context.dtype, context.cap = chunk_tokens, dtype, cap
        if tempered_N is not None:
            context.mark_non_differentiable(tempered_N)
        return logprobs_N, expected_NE, tempered_N

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states and unembedding, from those of the first two results.

        The third takes no gradient: torch hands in None for it.
        """
        hidden_NH, unembedding_VH, token_ids_N, actions_VE, expected_NE = context.saved_tensors
        into_logprobs_N, into_expected_NE, _ = gradients
        sums = UnembeddingGradients(
            hidden_NH,
            unembedding_VH,
            needs=context.needs_input_grad[:2],
            dtype=context.dtype,
            cap=context.cap,
        )
        actions_VE = actions_VE.to(probability_dtype(context.dtype))
        # d ebar / d z = pi (e - ebar);  d log pi(y_t) / d z = 1[y = y_t] - pi
        centre_N = (into_expected_NE * expected_NE).sum(-1) + into_logprobs_N
        for rows in chunk_slices(hidden_NH.shape[0], context.chunk_tokens):
            into_expected_cE = into_expected_NE[rows].to(actions_VE.dtype)
            into_cV = multiply(into_expected_cE, actions_VE.T).sub_(centre_N[rows, None])
            policy_cV = sums.make_logits(rows)
            _multiply_by_softmax(into_cV, policy_cV)
            into_cV.scatter_add_(1, token_ids_N[rows, None], into_logprobs_N[rows, None])
            uncap_gradient(into_cV, policy_cV, context.cap)
            del policy_cV  # before the products of `add` are made
            sums.add(rows, into_cV)
            del into_cV  # before the next chunk's is made
        return *sums.finish(), None, None, None, None, None, None, None


def temper(logits_cV: Float32[Tensor, "c V"], temperature: float) -> Float32[Tensor, "c V"]:
    """Logits divided by the temperature; at 1 the same tensor."""
    return logits_cV if temperature == 1.0 else logits_cV / temperature


def read_written(
    logits_cV: Float32[Tensor, "c V"],
    token_ids_c: Int64[Tensor, " c"],
    temperature: float,
    kept_cK: Int32[Tensor, "c K"] | None = None,
) -> Float32[Tensor, " c"]:
    """Log-probabilities of the written tokens at a temperature, nats, [c].

    kept_cK: the tokens among which each was chosen, -1 where there are fewer; None: all.
    """
    tempered_cV = temper(logits_cV, temperature)
    written_c1 = tempered_cV.gather(1, token_ids_c[:, None])
    if kept_cK is not None:
        kept_logits_cK = tempered_cV.gather(1, kept_cK.clamp_min(0).long())
        tempered_cV = kept_logits_cK.masked_fill(kept_cK < 0, -torch.inf)
    return written_c1.squeeze(1) - tempered_cV.logsumexp(dim=-1)


def _read_blocks(
    logits_cV: Tensor,
    token_ids_c: Tensor,
    temperature: float,
    kept_cK: Tensor | None,
    logprobs_c: Tensor,
) -> None:
    for block in block_slices(logits_cV):
        kept_bK = None if kept_cK is None else kept_cK[block]
        logprobs_c[block] = read_written(logits_cV[block], token_ids_c[block], temperature, kept_bK)


def _normalise_in_place(logits_cV: Tensor, token_ids_c: Tensor, logprobs_c: Tensor) -> None:
    """Logits become probabilities where they stand; the written tokens' logprobs are filled in."""
    for block in block_slices(logits_cV):
        logprobs_bV = logits_cV[block].log_softmax(dim=-1)
        logprobs_c[block] = logprobs_bV.gather(1, token_ids_c[block, None]).squeeze(1)
        torch.exp(logprobs_bV, out=logits_cV[block])


def _multiply_by_softmax(values_cV: Tensor, logits_cV: Tensor) -> None:
    for block in block_slices(values_cV):
        values_cV[block].mul_(logits_cV[block].softmax(dim=-1))
