"""Total variation distance between teacher and student, as in f-distill."""

from __future__ import annotations

from jaxtyping import Float32
from torch import Tensor

from distill_system.config.objective.token_losses import TotalVariationConfig
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.vocabulary import VocabularyChunk


def total_variation(
    config: TotalVariationConfig, chunk: VocabularyChunk, rows: TokenRows
) -> Float32[Tensor, " c"]:
    """1/2 sum_y |pi*(y) - pi_theta(y)|, in [0, 1], [c].

    Source: f-distill (Wen et al., arXiv 2307.15190, the TVD form of its step-wise decomposition).
    Differs: nothing at a token; on-policy, the paper takes half of its tokens from teacher text,
    which here is on_policy_weight.
    """
    gap_cV = chunk.student_logprobs_cV.exp() - chunk.teacher_logprobs_cV.exp()
    return 0.5 * gap_cV.abs().sum(dim=-1)
