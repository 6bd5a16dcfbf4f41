"""Next-token loss on text as it stands: a corpus beside the objective, or a stream of it."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from distill_system.objectives.rows import PolicyHeads, TokenRows


def language_model_loss(heads: PolicyHeads, rows: TokenRows) -> Float32[Tensor, ""]:
    """This rank's share of the mean cross-entropy over all tokens of the rows' stream, nats.

    Source: the pre-training loss of MiniLLM (arXiv 2306.08543), L_PT. Differs: nothing.
    """
    means_N = torch.full(
        rows.token_ids_N.shape, 1.0 / rows.num_global_tokens, device=rows.token_ids_N.device
    )
    return heads.sum(rows, lambda chunk: -chunk.written_logprobs_c, means_N).total
