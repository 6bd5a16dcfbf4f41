"""Forward KL where the teacher's mass is, the rest clipped into one bucket: after DAC-KL."""

from __future__ import annotations

import torch
from jaxtyping import Float32
from torch import Tensor

from distill_system.config.objective.token_losses import AdaptiveClipKlConfig
from distill_system.objectives.divergences import MASKED_LOGPROB
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.vocabulary import VocabularyChunk


def adaptive_clip_kl(
    config: AdaptiveClipKlConfig, chunk: VocabularyChunk, rows: TokenRows
) -> Float32[Tensor, " c"]:
    """KL(pi* || pi_theta) over the teacher's dense tokens and one bucket for the others, nats, [c].

    Dense at a state are its most likely tokens up to the first at which they hold `mass` of the
    teacher's probability: a few where it is sure, many where it is not. At mass 1 it is the
    forward KL, else at most that (data processing inequality); it is 0 only where the student
    agrees on every dense token and on the mass of the rest.
    Source: DAC-KL (Liu et al., arXiv 2407.10068, token level). Differs: there a small network,
    trained through the loss, says at each token between which quantiles of the teacher's
    distribution the KL is taken. A loss has no weights here: the lower quantile is the rule above,
    there is no upper one, and what is clipped off is compared as one bucket instead of left out,
    so that the student cannot hide mass there.
    """
    teacher_cV, student_cV = chunk.teacher_logprobs_cV, chunk.student_logprobs_cV
    # strictly below: tokens as likely as the threshold are all dense, whichever sorted first
    sparse_cV = teacher_cV < _threshold(teacher_cV, config.mass)
    pointwise_cV = teacher_cV.exp() * (teacher_cV - student_cV)
    dense_part_c = pointwise_cV.masked_fill(sparse_cV, 0.0).sum(dim=-1)
    teacher_rest_c, student_rest_c = (
        logprobs_cV.masked_fill(~sparse_cV, MASKED_LOGPROB).logsumexp(dim=-1)
        for logprobs_cV in (teacher_cV, student_cV)
    )
    return dense_part_c + teacher_rest_c.exp() * (teacher_rest_c - student_rest_c)


def _threshold(teacher_cV: Tensor, mass: float) -> Tensor:
    """The log-probability of the least likely dense token, [c, 1]."""
    sorted_cV = teacher_cV.sort(dim=-1, descending=True).values
    held_cV = sorted_cV.exp().cumsum(dim=-1)
    # in float32 the last sum can stay below 1: mass 1 then keeps every token
    last_dense_c1 = (held_cV < mass).sum(dim=-1, keepdim=True)
    return torch.gather(sorted_cV, 1, last_dense_c1.clamp_max(sorted_cV.shape[1] - 1))
