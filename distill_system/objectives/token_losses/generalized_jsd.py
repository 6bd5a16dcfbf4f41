"""Generalised Jensen-Shannon divergence, the divergence of GKD."""

from __future__ import annotations

from jaxtyping import Float32
from torch import Tensor

from distill_system.config.objective.token_losses import GeneralizedJsdConfig
from distill_system.objectives.divergences import jensen_shannon
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.vocabulary import VocabularyChunk


def generalized_jsd(
    config: GeneralizedJsdConfig, chunk: VocabularyChunk, rows: TokenRows
) -> Float32[Tensor, " c"]:
    """b KL(pi* || m) + (1 - b) KL(pi_theta || m), m = b pi* + (1 - b) pi_theta, nats, [c].

    b is mixture_weight, the teacher's share of the mixture, as in the paper and in TRL's
    generalized_jsd_loss. Divided by b it tends to the forward KL as b -> 0; divided by 1 - b it
    tends to the reverse KL as b -> 1.
    Source: GKD (Agarwal et al., arXiv 2306.13649, section 2). Differs: b = 0 and b = 1 are refused
    instead of being read as the two KL divergences; they have names of their own.
    """
    return jensen_shannon(
        chunk.teacher_logprobs_cV, chunk.student_logprobs_cV, mixture_weight=config.mixture_weight
    )
