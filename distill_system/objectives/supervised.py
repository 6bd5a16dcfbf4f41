"""Supervised fine-tuning: next-token loss on the responses of a data set."""

from __future__ import annotations

from torch import Tensor

from distill_system.objectives.rows import (
    ObjectiveOutput,
    PolicyHeads,
    SumOverRanks,
    TokenRows,
    stream_mean,
)


class Supervised:
    """Cross-entropy of the off-policy (data) stream; asks nothing of a teacher."""

    def compute_loss(
        self,
        heads: PolicyHeads,
        off_policy: TokenRows | None,
        on_policy: TokenRows | None,
        sum_over_ranks: SumOverRanks,
    ) -> ObjectiveOutput:
        """-(1/N) sum log pi_theta(y_t | s_t), nats per response token."""
        assert off_policy is not None, "supervised fine-tuning reads data"
        assert on_policy is None, "supervised fine-tuning has no on-policy stream"
        loss = -stream_mean(heads.read(off_policy).logprobs_N, off_policy)
        return ObjectiveOutput(loss_share=loss, metric_shares={"cross_entropy": loss.detach()})

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: stateless."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to take back."""
