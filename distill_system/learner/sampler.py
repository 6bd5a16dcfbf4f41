"""Sampler against learner: what both say of the same on-policy tokens, over all ranks.

Everything here is read off one number a token, log pi_theta(y_t | s_t) - log mu(y_t | s_t), where
theta are the learner's weights and mu is what the engine recorded as it wrote the token. Of a token
that these very weights wrote it is rounding, else wrong weights in the engine: the gap. Of a token
that an older student wrote it is how far the student has moved since: the staleness metrics.

Axes: N on-policy response tokens of this rank, n some of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from distill_system.learner.collate import BehaviourRows
from distill_system.learner.ranks import Ranks
from distill_system.objectives import Importance, TokenRows
from distill_system.objectives.importance import ImportanceKind, RunningWeights, compute_log_ratios


def measure_gap(log_ratios_n: Float64[Tensor, " n"], ranks: Ranks) -> dict[str, float]:
    """logprob_gap: mean |log ratio| in nats; empty where no rank has a token. Every rank calls it.

    log_ratios_n: of tokens that were written with the weights that the learner holds.
    """
    count = torch.tensor(log_ratios_n.shape[0])
    sums = ranks.sum_scalars({"gap": log_ratios_n.abs().sum(), "count": count})
    return {"logprob_gap": sums["gap"] / sums["count"]} if sums["count"] else {}


def measure_largest_gap(log_ratios_n: Float64[Tensor, " n"], ranks: Ranks) -> dict[str, float]:
    """max_logprob_gap: the largest |log ratio| in nats. Every rank calls it, each with a token."""
    return {"max_logprob_gap": ranks.max(float(log_ratios_n.abs().max()))}


def compare_with_sampler(
    behaviour: BehaviourRows, student_logprobs_N: Float[Tensor, " N"], ranks: Ranks, *, step: int
) -> dict[str, float]:
    """logprob_gap of a step; left out where the version that learns has written none of its text.

    step: the version of the student that learns, which is the number of updates made before.
    """
    log_ratios_N = compute_log_ratios(student_logprobs_N, behaviour.logprobs_N)
    return measure_gap(log_ratios_N[behaviour.versions_N == step], ranks)


def measure_staleness(
    rows: TokenRows, student_logprobs_N: Float[Tensor, " N"], importance: Importance, ranks: Ranks
) -> dict[str, float]:
    """Importance weights, and the divergence of who wrote the text from the student that learns.

    rows: the on-policy ones, with what their writer said of them. The weights are those of terms on
    states; where nothing is weighed, those that importance=token would give.
    """
    assert rows.behaviour_logprobs_N is not None, "the learner brings them with its own text"
    kind: ImportanceKind = "token" if importance.kind == "none" else importance.kind
    running = RunningWeights(rows, rows.behaviour_logprobs_N, kind=kind, cap=importance.cap)
    running.take(slice(0, student_logprobs_N.shape[0]), student_logprobs_N)
    log_weights_N = running.log_state_ratios()
    weights_N = running.states().double()
    log_ratios_N = compute_log_ratios(student_logprobs_N, rows.behaviour_logprobs_N)
    sums = ranks.sum_scalars(
        {
            "weights": weights_N.sum(),
            "squares": weights_N.square().sum(),
            "capped": (log_weights_N > running.log_cap).sum(),
            "log_ratios": log_ratios_N.sum(),
        }
    )
    count = rows.num_global_tokens
    return {
        "importance_mean": sums["weights"] / count,
        "importance_max": ranks.max(float(log_weights_N.exp().max())),
        "importance_capped_share": sums["capped"] / count,
        "importance_effective_share": _effective_share(sums, count),
        "behaviour_kl": -sums["log_ratios"] / count,
    }


def _effective_share(sums: Mapping[str, float], count: int) -> float:
    """(sum w)^2 / (n sum w^2): the share of the tokens that unweighted would say as much."""
    if sums["squares"] == 0.0:  # weights too small for the square of a float64
        return 0.0
    return sums["weights"] ** 2 / (count * sums["squares"])
