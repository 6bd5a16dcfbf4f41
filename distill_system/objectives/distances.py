"""Moments of both policies, and the distance that the whole class of critics finds in them.

Axes: N tokens, F feature size, E action-embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from distill_system.config.objective import StreamName
from distill_system.objectives.critics import moment_distance
from distill_system.objectives.rows import PolicyHeads, SumOverRanks, TokenRows
from distill_system.objectives.vocabulary import read_top_k, unit_rows


def compute_moment(
    features_NF: Float[Tensor, "N F"],
    gap_NE: Float[Tensor, "N E"],
    weights_N: Float[Tensor, " N"],
    num_global_tokens: int,
    sum_over_ranks: SumOverRanks,
) -> Float32[Tensor, "F E"]:
    """M = (1/N) sum_t w_t g_t d_t^T over all ranks, float32 [F, E], detached."""
    # One [F, E] matrix is all that ranks exchange: it does not grow with the batch.
    share_FE = features_NF.detach().T @ (weights_N[:, None] * gap_NE.detach())
    return sum_over_ranks(share_FE) / num_global_tokens


@dataclass(frozen=True, slots=True)
class HeldOutMeasures:
    """How far the student is from the teacher on one stream.

    distance: d_off or d_on of the whole critic class, the closed-form inner maximum.
    cross_entropy: -E log pi_theta(y_t | s_t), nats per token of the stream.
    student_logprobs_N: log pi_theta(y_t | s_t) of this rank's rows.
    """

    distance: float
    cross_entropy: float
    student_logprobs_N: Float[Tensor, " N"]


def measure_stream(
    heads: PolicyHeads,
    rows: TokenRows,
    sum_over_ranks: SumOverRanks,
    *,
    stream: StreamName,
    ball: str = "spectral",
    radius: float = 1.0,
) -> HeldOutMeasures:
    """Both measures of one stream, from one read of the vocabulary, without an update.

    The distance has both sides in expectation and is undiscounted, so it is exactly zero where
    student equals teacher. off_policy reads the student's features on teacher text, on_policy the
    teacher's features on student text.
    """
    teacher_features_NF, expected_NE = read_teacher(rows)
    features_NF = rows.hidden_NH if stream == "off_policy" else teacher_features_NF
    student = heads.read(rows)
    gap_NE = expected_NE - student.expected_embedding_NE
    ones_N = torch.ones(gap_NE.shape[0], device=gap_NE.device)
    # The student is read as it learns, under the caller's autocast; its moments are not.
    with torch.autocast(gap_NE.device.type, enabled=False):
        moment_FE = compute_moment(
            unit_rows(features_NF), gap_NE, ones_N, rows.num_global_tokens, sum_over_ranks
        )
    total = sum_over_ranks(student.logprobs_N.detach().sum().reshape(1))
    return HeldOutMeasures(
        distance=moment_distance(moment_FE, ball=ball, radius=radius),
        cross_entropy=-float(total) / rows.num_global_tokens,
        student_logprobs_N=student.logprobs_N.detach(),
    )


@torch.no_grad()
def measure_overlap(heads: PolicyHeads, rows: TokenRows, sum_over_ranks: SumOverRanks) -> float:
    """Mean over tokens of |top K of the student and of the teacher| / K, 0..1.

    How many of the tokens that either finds most likely they have in common, at states that the
    student visits. Successful on-policy distillation brings it up.

    Source: arXiv 2604.13016, overlap ratio. Differs: over a fixed set of held-out prompts.
    """
    teacher = rows.teacher
    assert teacher is not None, "HELD_OUT holds the teacher's most likely tokens"
    theirs_NK = teacher.top_k_ids_NK
    assert theirs_NK is not None, "HELD_OUT holds the teacher's most likely tokens"
    own_NK, _ = read_top_k(
        rows.hidden_NH,
        heads.unembedding_VH,
        k=theirs_NK.shape[1],
        chunk_tokens=heads.chunk_tokens,
        logit_cap=heads.logit_cap,
    )
    shared_NK = (own_NK[:, :, None] == theirs_NK[:, None, :]).any(dim=-1)
    total = sum_over_ranks(shared_NK.float().mean(dim=-1).sum().reshape(1))
    return float(total) / rows.num_global_tokens


def read_teacher(rows: TokenRows) -> tuple[Float[Tensor, "N F"], Float[Tensor, "N E"]]:
    """The teacher's features [N, F] and expected embeddings [N, E]."""
    teacher = rows.teacher
    assert teacher is not None, "AMMD declares MOMENTS; the learner must bring them"
    assert teacher.features_NF is not None, "MOMENTS hold the features"
    assert teacher.expected_embedding_NE is not None, "MOMENTS hold the expected embeddings"
    return teacher.features_NF, teacher.expected_embedding_NE
