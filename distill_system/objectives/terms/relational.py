"""Relation matching: how alike the tokens of a response are to the student and to the teacher.

Axes: N tokens, T tokens of one response, H and F hidden sizes, b rows at once.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill_system.objectives.importance import ImportanceWeights
from distill_system.objectives.rows import SumOverRanks, TokenRows, weigh
from distill_system.objectives.vocabulary import unit_rows

ROWS_AT_ONCE = 1024
"""Lines of a response's cosine matrix that exist at once, in forward and in backward."""


class Relational:
    """Mean over responses of the mean squared difference between two cosine matrices.

    (1/T^2) sum_ij (cos(h_i, h_j) - cos(h*_i, h*_j))^2 over the T tokens of a response; the hidden
    sizes need not be equal, and no projection is needed.
    Source: relation distillation of LLaVA-KD (Cai et al., arXiv 2410.16236). Differs: it relates
    the visual tokens of an image and brings the two matrices together by their cosine; here the
    tokens are those of the response, and the matrices are compared entry by entry.
    """

    def compute_loss(
        self,
        rows: TokenRows,
        sum_over_ranks: SumOverRanks,
        weights: ImportanceWeights | None = None,
    ) -> Float[Tensor, ""]:
        """This rank's share of the mean over responses; in [0, 4] where all of them count 1."""
        assert rows.teacher is not None, "the objective declares that it needs teacher features"
        assert rows.teacher.features_NF is not None, "as above"
        with torch.autocast(rows.hidden_NH.device.type, enabled=False):
            student_NH = unit_rows(rows.hidden_NH)
            teacher_NF = unit_rows(rows.teacher.features_NF)
            _, counts = torch.unique_consecutive(rows.sequence_ids_N, return_counts=True)
            lengths: list[int] = counts.tolist()
            lines: list[Tensor | None] = [None] * len(lengths)
            if weights is not None:
                lines = [*weights.responses_N.split(lengths)]
            total = student_NH.sum() * 0.0  # a graph even where this rank has no rows
            for student_TH, teacher_TF, weights_T in zip(
                student_NH.split(lengths), teacher_NF.split(lengths), lines, strict=True
            ):
                total = total + _mean_squared_difference(student_TH, teacher_TF, weights_T)
            return total / rows.num_global_sequences

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: stateless."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to take back."""


def _mean_squared_difference(
    student_TH: Float[Tensor, "T H"],
    teacher_TF: Float[Tensor, "T F"],
    weights_T: Float[Tensor, " T"] | None,
) -> Float[Tensor, ""]:
    """Of the two T x T matrices, made a few lines at a time and again in backward; scalar.

    weights_T: what each line counts; None counts each as 1.
    """
    parts: list[Tensor | None] = [None] * -(-student_TH.shape[0] // ROWS_AT_ONCE)
    if weights_T is not None:
        parts = [*weights_T.split(ROWS_AT_ONCE)]
    # A response of 8192 tokens has a matrix of 256 MiB for each model; a block of lines has a part
    # of it, made again in backward.
    blocks = [
        checkpoint(
            _block,
            student_bH,
            student_TH,
            teacher_bF,
            teacher_TF,
            weights_b,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for student_bH, teacher_bF, weights_b in zip(
            student_TH.split(ROWS_AT_ONCE), teacher_TF.split(ROWS_AT_ONCE), parts, strict=True
        )
    ]
    return torch.stack(blocks).sum() / student_TH.shape[0] ** 2


def _block(
    student_bH: Tensor,
    student_TH: Tensor,
    teacher_bF: Tensor,
    teacher_TF: Tensor,
    weights_b: Tensor | None,
) -> Tensor:
    squared_bT = (student_bH @ student_TH.T - teacher_bF @ teacher_TF.T).square()
    return weigh(squared_bT, weights_b).sum()
