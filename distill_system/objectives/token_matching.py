"""A loss between the two policies at each token, on either stream or on both.

Most of the field is of this form, with another loss and another stream: word-level distillation,
SeqKD, ImitKD, GKD, DistiLLM, f-distill. The files of token_losses/ say which is whose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_system.config.objective import StreamName, TokenMatchingConfig
from distill_system.objectives.rows import (
    ObjectiveOutput,
    PolicyHeads,
    SumOverRanks,
    TokenRows,
)
from distill_system.objectives.token_losses import bind_token_loss
from distill_system.objectives.vocabulary import VocabularySum


class TokenMatching:
    """(1 - beta) E_off loss + beta E_on loss, means over the response tokens of each stream."""

    def __init__(self, config: TokenMatchingConfig) -> None:
        self.config = config

    def compute_loss(
        self,
        heads: PolicyHeads,
        off_policy: TokenRows | None,
        on_policy: TokenRows | None,
        sum_over_ranks: SumOverRanks,
    ) -> ObjectiveOutput:
        """A stream alone has weight 1, whatever beta is."""
        streams: list[tuple[StreamName, TokenRows, float]] = []
        beta = self.config.on_policy_weight
        if off_policy is not None and self.config.off_policy is not None:
            streams.append(("off_policy", off_policy, 1.0 - beta if on_policy else 1.0))
        if on_policy is not None and self.config.on_policy is not None:
            streams.append(("on_policy", on_policy, beta if off_policy else 1.0))
        assert streams, "the driver brings every stream that the configuration reads"
        sums = {name: self._sum(heads, name, rows) for name, rows, _ in streams}
        return ObjectiveOutput(
            loss_share=torch.stack(
                [weight * sums[name].total for name, _, weight in streams]
            ).sum(),
            metric_shares={f"{name}_loss": part.total.detach() for name, part in sums.items()},
            student_logprobs_N=sums["on_policy"].logprobs_N if "on_policy" in sums else None,
        )

    def _sum(self, heads: PolicyHeads, name: StreamName, rows: TokenRows) -> VocabularySum:
        config = self.config.off_policy if name == "off_policy" else self.config.on_policy
        assert config is not None, "the stream was chosen because it has a loss"
        means_N = torch.full(
            rows.token_ids_N.shape, 1.0 / rows.num_global_tokens, device=rows.token_ids_N.device
        )
        loss = bind_token_loss(config, rows)
        return heads.sum(rows, loss, means_N, temperature=self.config.temperature)

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: stateless."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to take back."""
