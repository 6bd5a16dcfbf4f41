"""How far the student has moved from the text it learns from: a step's metrics, over all ranks.

Axes: N on-policy response tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping

from distill_system.learner.collate import LearnerBatch
from distill_system.learner.ranks import Ranks
from distill_system.objectives import Importance, TokenRows
from distill_system.objectives.importance import ImportanceKind, RunningWeights
from distill_system.objectives.rows import ObjectiveOutput


def measure_staleness(
    batch: LearnerBatch,
    rows: TokenRows | None,
    output: ObjectiveOutput,
    importance: Importance,
    *,
    step: int,
    ranks: Ranks,
) -> dict[str, float]:
    """Weights, divergence of writer and student, and the gap of sampler and learner.

    Empty where the batch does not bring what the writer said of its tokens: all text is the newest.
    rows: the on-policy ones. step: the version of the student that learns; logprob_gap is of the
    tokens that this very version wrote, and left out where it wrote none.
    Weights are those of terms on states; where nothing is weighed, those that `token` would give.
    """
    behaviour, student_logprobs_N = batch.behaviour, output.student_logprobs_N
    if behaviour is None or rows is None or student_logprobs_N is None:
        return {}
    kind: ImportanceKind = "token" if importance.kind == "none" else importance.kind
    running = RunningWeights(rows, behaviour.logprobs_N, kind=kind, cap=importance.cap)
    running.take(slice(0, student_logprobs_N.shape[0]), student_logprobs_N)
    log_ratios_N = running.log_state_ratios()
    weights_N = running.states().double()
    gap_N = behaviour.logprobs_N.double() - student_logprobs_N.double()
    fresh_N = behaviour.versions_N == step
    sums = ranks.sum_scalars(
        {
            "weights": weights_N.sum(),
            "squares": weights_N.square().sum(),
            "capped": (log_ratios_N > running.log_cap).sum(),
            "gap": gap_N.sum(),
            "fresh_gap": gap_N[fresh_N].abs().sum(),
            "fresh": fresh_N.sum(),
        }
    )
    count = rows.num_global_tokens
    metrics = {
        "importance_mean": sums["weights"] / count,
        "importance_max": ranks.max(float(log_ratios_N.exp().max())),
        "importance_capped_share": sums["capped"] / count,
        "importance_effective_share": _effective_share(sums, count),
        "behaviour_kl": sums["gap"] / count,
    }
    if sums["fresh"] > 0:
        metrics["logprob_gap"] = sums["fresh_gap"] / sums["fresh"]
    return metrics


def _effective_share(sums: Mapping[str, float], count: int) -> float:
    """(sum w)^2 / (n sum w^2): the share of the tokens that unweighted would say as much."""
    if sums["squares"] == 0.0:
        return 0.0
    return sums["weights"] ** 2 / (count * sums["squares"])
