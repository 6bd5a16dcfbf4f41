"""Kullback-Leibler divergence between teacher and student, both ways round."""

from __future__ import annotations

from jaxtyping import Float32
from torch import Tensor

from distill_system.config.objective.token_losses import ForwardKlConfig, ReverseKlConfig
from distill_system.objectives.divergences import kl_divergence
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.vocabulary import VocabularyChunk


def forward_kl(
    config: ForwardKlConfig, chunk: VocabularyChunk, rows: TokenRows
) -> Float32[Tensor, " c"]:
    """KL(pi* || pi_theta) = sum_y pi*(y) (log pi*(y) - log pi_theta(y)), nats, [c].

    Source: knowledge distillation (Hinton et al. 2015, arXiv 1503.02531). Differs: no factor of the
    temperature squared.
    """
    return kl_divergence(chunk.teacher_logprobs_cV, chunk.student_logprobs_cV)


def reverse_kl(
    config: ReverseKlConfig, chunk: VocabularyChunk, rows: TokenRows
) -> Float32[Tensor, " c"]:
    """KL(pi_theta || pi*) = sum_y pi_theta(y) (log pi_theta(y) - log pi*(y)), nats, [c].

    Source: on-policy distillation (GKD, arXiv 2306.13649, table 1). The states are given: no
    gradient flows through how they were reached.
    """
    return kl_divergence(chunk.student_logprobs_cV, chunk.teacher_logprobs_cV)
