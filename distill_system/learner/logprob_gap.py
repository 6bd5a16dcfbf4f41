"""Sampler against learner: what both say of the same tokens under the same weights.

Axes: N response tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill_system.learner.collate import StreamTotals
from distill_system.learner.ranks import Ranks
from distill_system.records import Trajectory


def measure_logprob_gap(
    student_logprobs_N: Tensor,
    trajectories: Sequence[Trajectory],
    totals: StreamTotals,
    ranks: Ranks,
) -> dict[str, float]:
    """Mean and largest |log pi_learner(y_t | s_t) - what the sampler recorded|, nats, all ranks.

    Every rank calls it. Zero but for rounding where the engine that wrote the trajectories, at
    temperature 1 without truncation, holds the learner's weights.
    """
    behaviour_N = torch.cat([torch.from_numpy(t.behaviour_logprobs.copy()) for t in trajectories])
    gaps_N = (student_logprobs_N.cpu().double() - behaviour_N.double()).abs()
    total = ranks.sum_scalars({"gap": gaps_N.sum()})["gap"]
    return {
        "logprob_gap": total / totals.num_tokens,
        "max_logprob_gap": ranks.max(float(gaps_N.max())),
    }
