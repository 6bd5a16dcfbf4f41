"""Everything that needs a row over the whole vocabulary, made a chunk of tokens at a time.

Hidden states in -> per-token numbers out; no tensor of tokens x vocabulary outlives its chunk, in
forward or in backward (the chunk is made again there).

Axes: N response tokens, H hidden size, V vocabulary, E action-embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True)
class VocabularyRows:
    """What is kept of a policy's distribution at each token.

    logprobs_N: float32, log pi(y_t | s_t) in nats of the tokens that were written.
    expected_embedding_NE: float32, sum over y of pi(y | s_t) e(y).
    """

    logprobs_N: Tensor
    expected_embedding_NE: Tensor


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
    Memory: chunk_tokens x V float32 at once, in forward and in backward.
    """
    if hidden_NH.shape[0] == 0:
        empty_N = hidden_NH.sum(dim=-1).float()
        return VocabularyRows(empty_N, empty_N[:, None] * action_embeddings_VE[:1])
    chunks = [
        checkpoint(
            _read_chunk,
            hidden_cH,
            token_ids_c,
            unembedding_VH,
            action_embeddings_VE,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for hidden_cH, token_ids_c in zip(
            torch.split(hidden_NH, chunk_tokens),
            torch.split(token_ids_N, chunk_tokens),
            strict=True,
        )
    ]
    return VocabularyRows(
        torch.cat([logprobs for logprobs, _ in chunks]),
        torch.cat([expected for _, expected in chunks]),
    )


def _read_chunk(
    hidden_cH: Tensor, token_ids_c: Tensor, unembedding_VH: Tensor, action_embeddings_VE: Tensor
) -> tuple[Tensor, Tensor]:
    logprobs_cV = (hidden_cH @ unembedding_VH.T).float().log_softmax(dim=-1)
    written_c = logprobs_cV.gather(1, token_ids_c[:, None]).squeeze(1)
    return written_c, logprobs_cV.exp() @ action_embeddings_VE
