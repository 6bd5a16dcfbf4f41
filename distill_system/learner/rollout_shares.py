"""What the on-policy stream of a step looks like, as this rank's shares of metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from distill_system.learner.collate import LearnerBatch
from distill_system.objectives.rows import ObjectiveOutput
from distill_system.records import Finish, Stream


def rollout_shares(batch: LearnerBatch, output: ObjectiveOutput) -> dict[str, Tensor]:
    """Lengths, ends, and sampler against learner; empty where there is no such stream.

    logprob_gap is comparable where sampling is neither truncated nor tempered. Where older students
    may have written the text it is left to measure_staleness.
    """
    trajectories = batch.trajectories.get(Stream.ON_POLICY)
    if trajectories is None or output.student_logprobs_N is None:
        return {}
    totals = batch.totals[Stream.ON_POLICY]
    ended = sum(trajectory.finish is Finish.STOP for trajectory in trajectories)
    tokens = sum(trajectory.num_response_tokens for trajectory in trajectories)
    shares = {
        "mean_student_response_tokens": torch.tensor(tokens / totals.num_sequences),
        "student_ended_share": torch.tensor(ended / totals.num_sequences),
    }
    if batch.behaviour is not None:
        return shares
    behaviour_N = torch.cat(
        [torch.from_numpy(trajectory.behaviour_logprobs.copy()) for trajectory in trajectories]
    )
    gap = (output.student_logprobs_N.cpu() - behaviour_N).abs().sum() / totals.num_tokens
    return {**shares, "logprob_gap": gap}
