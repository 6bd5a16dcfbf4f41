"""FIRST: the teacher's top-k probabilities, recalibrated and renormalised, as soft targets."""

from __future__ import annotations

from jaxtyping import Float32
from torch import Tensor

from distill_system.config.objective.token_losses import FirstConfig
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.vocabulary import VocabularyChunk


def first(config: FirstConfig, chunk: VocabularyChunk, rows: TokenRows) -> Float32[Tensor, " c"]:
    """-sum over the k tokens of target(y) log pi_theta(y), nats, [c].

    target = softmax over the k tokens of log pi*(y) / T, T = recalibration_temperature; the
    student keeps its softmax over the whole vocabulary, so that mass outside the k tokens is paid
    for. The teacher's own distribution is not the minimum: the student is asked for no tail.
    Source: FIRST (Shum et al., arXiv 2408.12168). Differs: its code takes the softmax of the k
    probabilities themselves, of the teacher and of the student alike, and their KL divergence;
    there the student's mass outside the k tokens goes unseen, and targets stay far from certain.
    T is chosen by the user, not by a search over calibration errors.
    """
    assert rows.teacher is not None, "the objective declares that it needs the teacher's top k"
    ids_NK, logprobs_NK = rows.teacher.top_k_ids_NK, rows.teacher.top_k_logprobs_NK
    assert ids_NK is not None, "the objective declares that it needs the teacher's top k"
    assert logprobs_NK is not None, "ids and log-probabilities come together"
    targets_cK = (logprobs_NK[chunk.rows, : config.k] / config.recalibration_temperature).softmax(
        dim=-1
    )
    student_cK = chunk.student_logprobs_cV.gather(1, ids_NK[chunk.rows, : config.k])
    return -(targets_cK * student_cK).sum(dim=-1)
