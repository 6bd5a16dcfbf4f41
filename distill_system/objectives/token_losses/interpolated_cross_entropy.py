"""Cross-entropy to a target between the token written and the teacher: self-distillation."""

from __future__ import annotations

from jaxtyping import Float32
from torch import Tensor

from distill_system.config.objective.token_losses import InterpolatedCrossEntropyConfig
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.vocabulary import VocabularyChunk


def interpolated_cross_entropy(
    config: InterpolatedCrossEntropyConfig, chunk: VocabularyChunk, rows: TokenRows
) -> Float32[Tensor, " c"]:
    """-sum_y target(y) log pi_theta(y), target = (1 - w) 1[y = y_t] + w pi*, nats, [c].

    w is teacher_weight at this point of the run (InterpolatedCrossEntropyConfig.at), so that a
    linear schedule has w = teacher_weight x step / steps.
    Source: PS-KD (Kim et al., arXiv 2006.12000, equation 4 and its linear growth). Differs: w grows
    with the step, not with the epoch, and the teacher is the run's own, not the student of the
    epoch before; point teacher.path at a copy of the student to distil it into itself. The token
    written is the ground truth where the off-policy stream is read from data.
    """
    w = config.teacher_weight
    teacher_part_c = (chunk.teacher_logprobs_cV.exp() * chunk.student_logprobs_cV).sum(dim=-1)
    return -(1.0 - w) * chunk.written_logprobs_c - w * teacher_part_c
