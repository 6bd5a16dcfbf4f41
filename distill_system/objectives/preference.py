"""Preferences between two answers to a prompt, the teacher being the reference: DPO and KTO pairs.

    r(x, y) = log q(y | x) - log p(y | x)                 of whole answers; q student, p teacher
    dpo       -log sigmoid( beta (r+ - r-) )              mean over the pairs
    kto_pair  1 - sigmoid( beta (r+ - z-) ),  1 - sigmoid( beta (z+ - r-) )
              z+- = max(0, mean of r+-)                   mean over both halves of all pairs

Source: DPO, arXiv 2305.18290, with the teacher in the place of its frozen start (LLaVA-MoD, arXiv
2408.15881); kto_pair as TRL had it, gradient through z included. Differs: nothing.
The two halves of a pair may stand on two ranks. The loss depends on one number a sequence, r; all
ranks hear of all of them, and each carries the gradient of its own.
Axes: N tokens and S sequences of one stream on this rank, P pairs on all ranks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from distill_system.config.objective import PreferenceConfig
from distill_system.objectives.rows import (
    ObjectiveOutput,
    PairRows,
    PolicyHeads,
    SumOverRanks,
    TokenRows,
)


class Preference:
    """A mean over the pairs of a step of which both halves are there; stateless."""

    def __init__(self, config: PreferenceConfig) -> None:
        self.config = config

    def compute_loss(
        self,
        heads: PolicyHeads,
        off_policy: TokenRows | None,
        on_policy: TokenRows | None,
        sum_over_ranks: SumOverRanks,
    ) -> ObjectiveOutput:
        """The value is the loss; its gradient flows through this rank's own sequences."""
        streams = [rows for rows in (off_policy, on_policy) if rows is not None]
        student_logprobs_N = None
        own_2P, there_2P = _places(streams[0]), _places(streams[0])
        for rows in streams:
            student = heads.read_written(rows)
            pairs, ratios_S = _log_ratios(rows, student.logprobs_N)
            place = (pairs.is_worse_S.long(), pairs.numbers_S)
            own_2P = own_2P.index_put(place, ratios_S)
            there_2P = there_2P.index_put(place, torch.ones_like(ratios_S))
            if rows is on_policy:
                student_logprobs_N = student.behaviour_logprobs_N
        all_2P, all_there_2P = sum_over_ranks(torch.stack([own_2P.detach(), there_2P])).unbind()
        is_whole_P = all_there_2P.min(dim=0).values > 0
        with torch.enable_grad():
            ratios_2P = all_2P.requires_grad_()
            loss = self._mean_loss(*ratios_2P[:, is_whole_P])
            (gradient_2P,) = torch.autograd.grad(loss, ratios_2P)
        better_P, worse_P = ratios_2P.detach()[:, is_whole_P]
        surrogate = (gradient_2P * own_2P).sum()  # its gradient is the loss's, its value is not
        share = loss.detach() * there_2P.sum() / all_there_2P.sum()
        margin_P = better_P - worse_P
        return ObjectiveOutput(
            loss_share=surrogate - surrogate.detach() + share,
            metrics={
                "preference_margin": _mean(margin_P),
                "preference_accuracy": _mean((margin_P > 0).float()),
                "preference_pairs": float(margin_P.numel()),
            },
            student_logprobs_N=student_logprobs_N,
        )

    def _mean_loss(
        self, better_P: Float[Tensor, " P"], worse_P: Float[Tensor, " P"]
    ) -> Float[Tensor, ""]:
        """Of all whole pairs; 0 where there is none, as where each half's prompt was left out."""
        beta = self.config.beta
        if better_P.numel() == 0:
            return better_P.sum() + worse_P.sum()
        if self.config.loss == "dpo":
            return -logsigmoid(beta * (better_P - worse_P)).mean()
        above, below = (ratios_P.mean().clamp(min=0.0) for ratios_P in (better_P, worse_P))
        better_losses_P = 1.0 - torch.sigmoid(beta * (better_P - below))
        worse_losses_P = 1.0 - torch.sigmoid(beta * (above - worse_P))
        return torch.cat([better_losses_P, worse_losses_P]).mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: stateless."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to take back."""


def _places(rows: TokenRows) -> Float[Tensor, "2 P"]:
    """Room for a number of the better and of the worse half of every pair."""
    assert rows.pairs is not None, "the learner brings pairs with every stream"
    return torch.zeros(2, rows.pairs.num_pairs, device=rows.token_ids_N.device)


def _log_ratios(
    rows: TokenRows, student_logprobs_N: Float[Tensor, " N"]
) -> tuple[PairRows, Float[Tensor, " S"]]:
    assert rows.pairs is not None, "the learner brings pairs with every stream"
    assert rows.teacher is not None, "the objective declares log-probabilities"
    assert rows.teacher.logprobs_N is not None, "the objective declares log-probabilities"
    ratios_N = student_logprobs_N - rows.teacher.logprobs_N
    ratios_S = torch.zeros(rows.pairs.numbers_S.shape, device=ratios_N.device)
    return rows.pairs, ratios_S.index_add(0, rows.sequence_ids_N, ratios_N)


def _mean(values_P: Tensor) -> float:
    return float(values_P.mean()) if values_P.numel() else 0.0
