"""What a critic sees of a state: hidden states in -> unit rows out.

Unit rows keep |f(s, y)| = |g(s)^T phi e(y)| <= C for every critic of the spectral ball of radius C,
and with it the bound of the distance by total variation.

| docs/objectives.md | here |
|---|---|
| h(s) | hidden_NH, the student's or the teacher's |
| g(s) | features_ND, unit rows |

Axes: N tokens, H hidden size, D feature size: H, or fewer dimensions where they are projected.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from distill_system.config.objective.ammd import FeaturesConfig, ProjectedFeatures, WhitenedFeatures
from distill_system.objectives.moving_average import MovingAverage
from distill_system.objectives.rows import SumOverRanks, weigh
from distill_system.objectives.vocabulary import unit_rows


@runtime_checkable
class StateFeatures(Protocol):
    """The map g of one critic."""

    def extract(
        self,
        hidden_NH: Float[Tensor, "N H"],
        num_global_tokens: int,
        sum_over_ranks: SumOverRanks,
        weights_N: Float[Tensor, " N"] | None = None,
    ) -> Float32[Tensor, "N D"]:
        """Unit rows g(s_t), float32 [N, D], without graph.

        weights_N: what each row counts in a mean over rows; None counts each as 1.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What the next extraction depends on."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what state_dict gave."""


class _Stateless:
    """Nothing of one step is used in the next."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to take back."""


class Unit(_Stateless):
    """g = h / |h|."""

    def extract(
        self,
        hidden_NH: Float[Tensor, "N H"],
        num_global_tokens: int,
        sum_over_ranks: SumOverRanks,
        weights_N: Float[Tensor, " N"] | None = None,
    ) -> Float32[Tensor, "N D"]:
        """Each row divided by its length."""
        return unit_rows(hidden_NH.detach())


class Projected(_Stateless):
    """g = P^T h / |P^T h| with P [H, D] Gaussian, drawn once from a seed on the CPU.

    Angles between states are kept within about 1/sqrt(D) (Johnson and Lindenstrauss 1984); moment
    matrix and polar factor shrink by D/H.
    """

    def __init__(self, config: ProjectedFeatures) -> None:
        self.config = config
        self.projection_HD: Tensor | None = None  # H is known with the first states

    def extract(
        self,
        hidden_NH: Float[Tensor, "N H"],
        num_global_tokens: int,
        sum_over_ranks: SumOverRanks,
        weights_N: Float[Tensor, " N"] | None = None,
    ) -> Float32[Tensor, "N D"]:
        """Each row projected, then divided by its length."""
        if self.projection_HD is None:
            self.projection_HD = draw_gaussian(
                hidden_NH.shape[1], self.config.dimension, self.config.seed
            ).to(hidden_NH.device)
        return unit_rows(hidden_NH.detach().float() @ self.projection_HD)


class Whitened:
    """g = L^-1 x / |L^-1 x| with x = h / |h| and L L^T the regularised second moment of x.

    L^-1 is an inverse square root of the second moment. The symmetric one differs from it by a
    rotation of g, which changes neither lengths nor a ball's maximum, and costs ten times as much.
    """

    def __init__(self, config: WhitenedFeatures) -> None:
        self.config = config
        self.second_moment = MovingAverage(config.decay)

    def extract(
        self,
        hidden_NH: Float[Tensor, "N H"],
        num_global_tokens: int,
        sum_over_ranks: SumOverRanks,
        weights_N: Float[Tensor, " N"] | None = None,
    ) -> Float32[Tensor, "N D"]:
        """Each row whitened by the second moment up to this step, then divided by its length."""
        rows_NH = unit_rows(hidden_NH.detach())
        weighted_NH = weigh(rows_NH, weights_N)
        step_HH = sum_over_ranks(rows_NH.T @ weighted_NH) / num_global_tokens
        moment_HH = self.second_moment.update(step_HH).double()
        mean_eigenvalue = moment_HH.diagonal().mean()
        # Float64: one direction of a language model's hidden states can hold nearly all of them.
        moment_HH.diagonal().add_(self.config.regularisation * mean_eigenvalue)
        root_HH = torch.linalg.cholesky(moment_HH)
        identity_HH = torch.eye(len(root_HH), dtype=root_HH.dtype, device=root_HH.device)
        inverse_HH = torch.linalg.solve_triangular(root_HH, identity_HH, upper=False)
        return unit_rows(rows_NH @ inverse_HH.T.float())

    def state_dict(self) -> dict[str, Tensor]:
        """The moving average of the second moment."""
        return self.second_moment.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back the moving average."""
        self.second_moment.load_state_dict(state)


def draw_gaussian(num_rows: int, num_columns: int, seed: int) -> Tensor:
    """Standard normal float32 [num_rows, num_columns], the same on every machine and rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_columns, generator=generator)


def build_features(config: FeaturesConfig) -> StateFeatures:
    """The map that the configuration names."""
    if isinstance(config, WhitenedFeatures):
        return Whitened(config)
    return Projected(config) if isinstance(config, ProjectedFeatures) else Unit()
