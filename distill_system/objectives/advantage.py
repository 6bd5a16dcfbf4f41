"""The widened critic class of AMMD: one more action feature, made of log-probabilities.

    f(s, y) = g(s)^T phi e(y) + w kappa(s) l(s, y)

In the soft reading of reinforcement learning, log pi*(y | s) is the teacher's action value up to a
term of the state, so it belongs in a class of action values. Both features are divided by the clip
c, so |l| <= 1 and the part's gap is at most 2 w times the total variation at the state:

| type | l(s, y) | kappa(s) |
|---|---|---|
| soft_advantage | max(log pi*(y | s), -c) / c | the sign of the feature's own gap at the state |
| log_ratio | clip(log pi*(y | s) - log pi_theta(y | s), -c, c) / c | 1: the gap is never negative |

The soft advantage is not centred: a term of the state alone, as log pi*'s own mean, has the same
expectation under both policies and cancels in every gap. kappa and l are held fixed where the gap
is differentiated; for the signed form that is the envelope theorem, as for phi. Gaps are always
expectations on both sides: the whole distributions are there.

Source: ours (docs/objectives.md). Axes: N tokens, b tokens of a block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from distill_system.config.objective.ammd import AdvantageConfig
from distill_system.objectives.rows import PolicyHeads, TokenRows
from distill_system.objectives.vocabulary import VocabularyChunk

GAP_NOISE = 1e-6
"""A gap of the soft advantage no larger than this is float32 rounding, answered by kappa = 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageRows:
    """The feature's part of the critics' game on one stream.

    total: sum_t w_t cost_t, a scalar with graph to the student where one was asked for.
    expected_costs_N: w kappa (E_pi* l - E_pi_theta l), detached.
    sampled_costs_N: w kappa (E_pi* l - l(y_t)), detached.
    """

    total: Float[Tensor, ""]
    expected_costs_N: Float[Tensor, " N"]
    sampled_costs_N: Float[Tensor, " N"]


def read_advantage(
    config: AdvantageConfig, heads: PolicyHeads, rows: TokenRows, weights_N: Float[Tensor, " N"]
) -> AdvantageRows:
    """Play kappa up at each state and sum what the feature finds; weights_N [N] as in heads.sum.

    The student's logits are made once more than the rest of AMMD makes them, the teacher's once.
    """
    sampled_N = torch.empty(rows.token_ids_N.shape, device=rows.token_ids_N.device)

    def chunk_cost(chunk: VocabularyChunk) -> Tensor:
        student_bV, teacher_bV = chunk.student_logprobs_cV, chunk.teacher_logprobs_cV
        # l and kappa are the critic's: detached, so that only the expectation under the student
        # carries a gradient
        feature_bV = _action_feature(config, student_bV.detach(), teacher_bV)
        teacher_mean_b = (teacher_bV.exp() * feature_bV).sum(dim=-1)
        gap_b = teacher_mean_b - (student_bV.exp() * feature_bV).sum(dim=-1)
        scale_b = config.weight * _sign(config, gap_b.detach())
        written_b = feature_bV.gather(1, chunk.token_ids_c[:, None]).squeeze(1)
        sampled_N[chunk.rows] = scale_b * (teacher_mean_b - written_b)
        return scale_b * gap_b

    part = heads.sum(rows, chunk_cost, weights_N)
    return AdvantageRows(
        total=part.total, expected_costs_N=part.values_N, sampled_costs_N=sampled_N
    )


def _action_feature(
    config: AdvantageConfig, student_bV: Float[Tensor, "b V"], teacher_bV: Float[Tensor, "b V"]
) -> Float[Tensor, "b V"]:
    """l at every token of the vocabulary, [b, V], in -1..1."""
    if config.type == "soft_advantage":
        return teacher_bV.clamp(min=-config.clip) / config.clip
    return (teacher_bV - student_bV).clamp(-config.clip, config.clip) / config.clip


def _sign(config: AdvantageConfig, gap_b: Tensor) -> Tensor:
    """kappa, [b]."""
    if config.type == "log_ratio":
        return torch.ones_like(gap_b)
    return torch.where(gap_b.abs() > GAP_NOISE, gap_b.sign(), 0.0)
