"""Skew Kullback-Leibler divergences, both ways round: the losses of DistiLLM."""

from __future__ import annotations

from jaxtyping import Float32
from torch import Tensor

from distill_system.config.objective.token_losses import SkewKlConfig, SkewReverseKlConfig
from distill_system.objectives.divergences import kl_divergence, log_mixture
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.vocabulary import VocabularyChunk


def skew_kl(config: SkewKlConfig, chunk: VocabularyChunk, rows: TokenRows) -> Float32[Tensor, " c"]:
    """KL(pi* || a pi* + (1 - a) pi_theta), nats, [c]; at most -log a.

    a is skew. Source: DistiLLM (Ko et al., arXiv 2402.03898, skew KL). Differs: nothing.
    """
    teacher_cV = chunk.teacher_logprobs_cV
    mixture_cV = log_mixture(teacher_cV, chunk.student_logprobs_cV, first_weight=config.skew)
    return kl_divergence(teacher_cV, mixture_cV)


def skew_reverse_kl(
    config: SkewReverseKlConfig, chunk: VocabularyChunk, rows: TokenRows
) -> Float32[Tensor, " c"]:
    """KL(pi_theta || (1 - a) pi* + a pi_theta), nats, [c]; at most -log a.

    a is skew. Source: DistiLLM (Ko et al., arXiv 2402.03898, skew reverse KL). Differs: nothing.
    """
    student_cV = chunk.student_logprobs_cV
    mixture_cV = log_mixture(student_cV, chunk.teacher_logprobs_cV, first_weight=config.skew)
    return kl_divergence(student_cV, mixture_cV)
