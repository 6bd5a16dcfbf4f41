"""Costs of later tokens, and what is subtracted from them: reward-to-go and baselines.

Axes: N flat response tokens, S sequences, T longest response.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from distill_system.objectives.rows import SumOverRanks, TokenRows, pad_rows


def cost_to_go(
    costs_N: Float[Tensor, " N"], rows: TokenRows, *, discount: float
) -> Float[Tensor, " N"]:
    """Discounted sum of each token's cost and all later costs of its response.

    Shapes: costs_N float [N]; returns [N]. Units: the costs' own.
    Source: AMMD, arXiv 2406.02959, the reward-to-go of its on-policy gradient. Differs: costs are
        minimised here where the paper maximises rewards; reward-to-go is minus this.
    """
    # The grid holds zeros behind a response, so that its sum begins at 0; with a closed form,
    # discount^-T would overflow on long responses.
    grid_ST = pad_rows(costs_N, rows)
    add_later = _add_later_doubling if grid_ST.is_cuda else _add_later_in_turn
    return add_later(grid_ST, discount)[rows.sequence_ids_N, rows.positions_N]


def _add_later_in_turn(grid_ST: Float[Tensor, "S T"], discount: float) -> Float[Tensor, "S T"]:
    """Each column plus discount times the sum behind it, the last column first; in place."""
    running_S = grid_ST.new_zeros(grid_ST.shape[0])
    for position in reversed(range(grid_ST.shape[1])):
        running_S = grid_ST[:, position] + discount * running_S
        grid_ST[:, position] = running_S
    return grid_ST


def _add_later_doubling(grid_ST: Float[Tensor, "S T"], discount: float) -> Float[Tensor, "S T"]:
    """The same in log2 T steps, each of which doubles how many columns a sum has taken in.

    A GPU waits for the host at each of T small steps: 25 ms of a step at T = 512.
    """
    reach = 1
    while reach < grid_ST.shape[1]:
        later_ST = torch.nn.functional.pad(grid_ST[:, reach:], (0, reach))
        grid_ST = grid_ST + discount**reach * later_ST
        reach *= 2
    return grid_ST


def future_cost_to_go(
    costs_N: Float[Tensor, " N"], rows: TokenRows, *, discount: float, normalise: bool
) -> Float[Tensor, " N"]:
    """Discounted sum of strictly later costs, optionally over the number of later tokens.

    Shapes: costs_N float [N]; returns [N], 0 at each response's last token.
    """
    future_N = cost_to_go(costs_N, rows, discount=discount) - costs_N
    if not normalise:
        return future_N
    later_N = cost_to_go(torch.ones_like(costs_N), rows, discount=1.0) - 1.0
    return future_N / later_N.clamp_min(1.0)


def compute_baseline(
    kind: str,
    returns_N: Float[Tensor, " N"],
    rows: TokenRows,
    sum_over_ranks: SumOverRanks,
    *,
    longest: int,
) -> Float[Tensor, " N"]:
    """A baseline that does not depend on the action at its own token, but for the batch's means.

    none: zero. batch: mean over all tokens. position: mean over all tokens at the same position.
    These means include the token itself, a bias of one part in the number averaged.
    leave_one_out: mean at the same position over the other responses, which are independent of the
    token: no bias; zero where no other response is as long.

    Source of leave_one_out: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free".
        Differs: the other responses answer other prompts too.

    Shapes: returns_N [N]; longest: a bound on response length, the same on all ranks; returns [N].
    """
    if kind == "none":
        return torch.zeros_like(returns_N)
    if kind == "batch":
        total = sum_over_ranks(returns_N.sum().reshape(1))
        return (total / rows.num_global_tokens).expand_as(returns_N)
    # sums and counts in one transfer; `longest` is a setting, so that ranks agree on the size
    sums_2T = returns_N.new_zeros(2, longest)
    sums_2T[0].index_add_(0, rows.positions_N, returns_N)
    sums_2T[1].index_add_(0, rows.positions_N, torch.ones_like(returns_N))
    total_T, count_T = sum_over_ranks(sums_2T)
    if kind == "position":
        return (total_T / count_T.clamp_min(1.0))[rows.positions_N]
    others_N = count_T[rows.positions_N] - 1.0
    sum_N = torch.where(others_N > 0, total_T[rows.positions_N] - returns_N, 0.0)
    return sum_N / others_N.clamp_min(1.0)
