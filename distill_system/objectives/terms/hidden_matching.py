"""Feature matching: the student's hidden states, linearly mapped, against the teacher's.

Axes: N tokens, I student hidden size and one constant, F teacher hidden size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from distill_system.config.objective.token_matching import HiddenMatchingConfig
from distill_system.objectives.importance import ImportanceWeights
from distill_system.objectives.moving_average import MovingAverage
from distill_system.objectives.rows import SumOverRanks, TokenRows, stream_mean, weigh


class HiddenMatching:
    """Distance between W h_theta and h*, with W the ridge regression of the steps so far.

    Source: feature distillation of LEADER (Liu et al., arXiv 2402.02803): mean squared error
    between projected student states and the hidden states of the teacher's last layer. Differs: the
    projection is not learnt by gradient but is the best one in closed form, from covariances over
    all ranks with a moving average over steps, and no gradient flows through it; the squared error
    is divided by the mean squared length of the teacher's states, so that 1 is the error of
    predicting 0; 1 - cosine is offered beside it; it is applied to every response token.
    """

    def __init__(self, config: HiddenMatchingConfig) -> None:
        self.config = config
        self.input_moment = MovingAverage(config.decay)
        self.cross_moment = MovingAverage(config.decay)

    def compute_loss(
        self,
        rows: TokenRows,
        sum_over_ranks: SumOverRanks,
        weights: ImportanceWeights | None = None,
    ) -> Float[Tensor, ""]:
        """The mean over the stream's tokens, covariances likewise; not below 0."""
        states_N = None if weights is None else weights.states_N
        targets_NF = _teacher_features(rows)
        with torch.autocast(rows.hidden_NH.device.type, enabled=False):
            inputs_NI = _with_constant(rows.hidden_NH.float())

            def moment(second_NX: Tensor) -> Tensor:
                share_IX = inputs_NI.detach().T @ weigh(second_NX, states_N)
                return sum_over_ranks(share_IX / rows.num_global_tokens)

            mapped_NF = inputs_NI @ self._solve(
                self.input_moment.update(moment(inputs_NI.detach())),
                self.cross_moment.update(moment(targets_NF)),
            )
            if self.config.distance == "cosine":
                distances_N = 1.0 - cosine_similarity(mapped_NF, targets_NF, dim=-1)
                return stream_mean(weigh(distances_N, states_N), rows)
            squared_N = (mapped_NF - targets_NF).square().sum(dim=-1)
            lengths_N = targets_NF.square().sum(dim=-1)
            mean_length = sum_over_ranks(stream_mean(weigh(lengths_N, states_N), rows))
            tiny = torch.finfo(torch.float32).tiny
            return stream_mean(weigh(squared_N, states_N), rows) / mean_length.clamp_min(tiny)

    def _solve(
        self, input_moment_II: Float[Tensor, "I I"], cross_moment_IF: Float[Tensor, "I F"]
    ) -> Float[Tensor, "I F"]:
        """W [I, F] that minimises E |W^T h - h*|^2 + ridge x mean(h^2) x |W|^2, float32."""
        # in float64: hidden states are correlated, and the map is the same on every rank
        moment_II = input_moment_II.double()
        penalty = self.config.ridge * moment_II.diagonal().mean()
        identity_II = torch.eye(len(moment_II), dtype=moment_II.dtype, device=moment_II.device)
        penalised_II = moment_II + penalty * identity_II
        return torch.linalg.solve(penalised_II, cross_moment_IF.double()).float()

    def state_dict(self) -> dict[str, Tensor]:
        """Both moving averages; empty before the first step."""
        averages = {"input_moment": self.input_moment, "cross_moment": self.cross_moment}
        return {
            f"{name}_{key}": value
            for name, average in averages.items()
            for key, value in average.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what state_dict gave."""
        for name in ("input_moment", "cross_moment"):
            prefix = f"{name}_"
            average: MovingAverage = getattr(self, name)
            average.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )


def _with_constant(hidden_NH: Tensor) -> Tensor:
    return torch.cat([hidden_NH, torch.ones_like(hidden_NH[:, :1])], dim=-1)


def _teacher_features(rows: TokenRows) -> Tensor:
    assert rows.teacher is not None, "the objective declares that it needs the teacher's features"
    assert rows.teacher.features_NF is not None, "as above"
    return rows.teacher.features_NF.float()
