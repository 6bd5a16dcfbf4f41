"""Sinkhorn distance between batches of teacher and student distributions: SinKD."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill_system.config.objective.token_losses import SinkhornConfig
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.vocabulary import VocabularyChunk


def sinkhorn(
    config: SinkhornConfig, chunk: VocabularyChunk, rows: TokenRows
) -> Float32[Tensor, " c"]:
    """What it costs to carry each token's student distribution to teacher ones of its batch, [c].

    For b tokens: costs D_ij = sum_y |pi_theta(y | s_i) - pi*(y | s_j)|; the plan is exp(-D/lambda)
    with rows and columns normalised in turn; token i's value is sum_j plan_ij D_ij, so that their
    sum is the batch's distance <plan, D>. Of one token alone it is twice the total variation.
    The gradient flows through the plan as well. Even where the student equals the teacher it is not
    0: the entropy spreads the plan over the batch, and only a small lambda takes that away.
    Source: SinKD (Cui et al., arXiv 2402.17110, batch-wise form; lambda 0.1 and 20 rounds are
    its). Differs: in log space, so that a small lambda does not underflow; a batch is the next
    batch_tokens tokens of the stream, mostly of one response, not one prediction of each example.
    """
    teacher_cV, student_cV = chunk.teacher_logprobs_cV.exp(), chunk.student_logprobs_cV.exp()
    batches = zip(
        student_cV.split(config.batch_tokens), teacher_cV.split(config.batch_tokens), strict=True
    )
    return torch.cat(
        [_row_costs(config, student_bV, teacher_bV) for student_bV, teacher_bV in batches]
    )


def _row_costs(
    config: SinkhornConfig, student_bV: Float32[Tensor, "b V"], teacher_bV: Float32[Tensor, "b V"]
) -> Float32[Tensor, " b"]:
    """sum_j plan_ij D_ij of one batch, [b]; the columns of the plan sum to 1."""
    costs_bb = _PairwiseL1.apply(student_bV, teacher_bV)  # type: ignore[no-untyped-call]  # torch types no Function
    log_plan_bb = -costs_bb / config.entropy_weight
    # Softmax over a row divides it by its sum: Sinkhorn's rounds, rows then columns, in log space.
    for _ in range(config.iterations):
        log_plan_bb = log_plan_bb.log_softmax(dim=1).log_softmax(dim=0)
    return (log_plan_bb.exp() * costs_bb).sum(dim=1)


class _PairwiseL1(torch.autograd.Function):
    """[b, V], [b, V] -> [b, b] sums of absolute differences; never b x b x V at once.

    Autograd, and the backward of torch.cdist on CUDA, would hold that. No gradient to the second.
    """

    @staticmethod
    def forward(context: Any, first_bV: Tensor, second_bV: Tensor) -> Tensor:
        context.save_for_backward(first_bV, second_bV)
        return torch.stack([(first_bV - row_V).abs().sum(dim=-1) for row_V in second_bV], dim=1)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        first_bV, second_bV = context.saved_tensors
        into_bV = torch.zeros_like(first_bV)
        for row_V, into_costs_b in zip(second_bV, gradients[0].unbind(dim=1), strict=True):
            into_bV.addcmul_((first_bV - row_V).sign_(), into_costs_b[:, None])
        return into_bV, None
