"""The teacher's k most likely tokens and one bucket for the rest, under a chosen divergence."""

from __future__ import annotations

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from distill_system.config.objective.token_losses import TopKConfig
from distill_system.objectives.divergences import MASKED_LOGPROB, jensen_shannon, kl_divergence
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.vocabulary import VocabularyChunk

SMALLEST_TAIL = 1e-7
"""Mass of the teacher's tail below which float32 log-probabilities do not tell it from 0."""


def top_k(config: TopKConfig, chunk: VocabularyChunk, rows: TokenRows) -> Float32[Tensor, " c"]:
    """D(teacher's buckets, student's buckets) over k tokens and the tail, nats, [c].

    The student's tail is the sum of all its probabilities outside the k tokens. By the data
    processing inequality the loss is at most the divergence over the whole vocabulary, and at
    least that between the two tail masses alone: mass pushed out of the k tokens is always paid
    for, as it is not when both sides are renormalised or the tail is left out.
    The teacher's tail is 1 minus what it sent, good to 1e-7: under reverse_kl, which divides by it,
    one below 1e-5 is blurred, and one below SMALLEST_TAIL counts as that.
    Source: one bucket for the rest is an option in the code of FIRST (arXiv 2408.12168). Differs:
    exact KL between the buckets, and the choice of divergence.
    """
    assert rows.teacher is not None, "the objective declares that it needs the teacher's top k"
    ids_NK, logprobs_NK = rows.teacher.top_k_ids_NK, rows.teacher.top_k_logprobs_NK
    assert ids_NK is not None, "the objective declares that it needs the teacher's top k"
    assert logprobs_NK is not None, "ids and log-probabilities come together"
    ids_cK = ids_NK[chunk.rows, : config.k]
    teacher_cB = _teacher_buckets(logprobs_NK[chunk.rows, : config.k])
    student_cB = _student_buckets(chunk.student_logprobs_cV, ids_cK)
    if ids_cK.shape[1] == chunk.student_logprobs_cV.shape[1]:  # every token has its own bucket
        teacher_cB, student_cB = teacher_cB[:, :-1], student_cB[:, :-1]
    match config.divergence:
        case "forward_kl":
            return kl_divergence(teacher_cB, student_cB)
        case "reverse_kl":
            return kl_divergence(student_cB, teacher_cB)
        case "jsd":
            return jensen_shannon(teacher_cB, student_cB, mixture_weight=0.5)


def _teacher_buckets(logprobs_cK: Float32[Tensor, "c K"]) -> Float32[Tensor, "c K+1"]:
    """The k log-probabilities with that of the tail behind them, [c, K + 1]."""
    # in float64, since 1 minus a sum near 1 keeps few digits
    tail_c1 = 1.0 - logprobs_cK.double().exp().sum(dim=-1, keepdim=True)
    return torch.cat([logprobs_cK, tail_c1.clamp_min(SMALLEST_TAIL).log().float()], dim=-1)


def _student_buckets(
    logprobs_cV: Float32[Tensor, "c V"], ids_cK: Int64[Tensor, "c K"]
) -> Float32[Tensor, "c K+1"]:
    """The student's log-probability of each bucket, [c, K + 1]."""
    # logsumexp over what is left, and not log(1 - sum): near mass 1 the difference would be noise
    outside_cV = logprobs_cV.scatter(1, ids_cK, MASKED_LOGPROB)
    tail_c1 = outside_cV.logsumexp(dim=-1, keepdim=True)
    return torch.cat([logprobs_cV.gather(1, ids_cK), tail_c1], dim=-1)
