"""What the on-policy stream of a step looks like, as this rank's shares of metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_system.learner.collate import LearnerBatch
from distill_system.records import Finish, Stream


def rollout_shares(batch: LearnerBatch) -> dict[str, Tensor]:
    """Mean length of the student's responses and how many ended; empty without such a stream."""
    trajectories = batch.trajectories.get(Stream.ON_POLICY)
    if trajectories is None:
        return {}
    count = batch.totals[Stream.ON_POLICY].num_sequences
    ended = sum(trajectory.finish is Finish.STOP for trajectory in trajectories)
    tokens = sum(trajectory.num_response_tokens for trajectory in trajectories)
    return {
        "mean_student_response_tokens": torch.tensor(tokens / count),
        "student_ended_share": torch.tensor(ended / count),
    }
