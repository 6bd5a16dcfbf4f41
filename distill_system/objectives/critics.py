"""The adversary: bilinear critics f(s, y) = g(s)^T phi e(y) and their best responses.

The moment matrix M = E sum_t gamma^t g_t (target_t - student_t)^T goes in; a critic matrix phi in a
norm ball comes out, and the moment-matching distance <phi, M>.

| paper | here |
|---|---|
| phi_1, phi_2 | critic_FE, one per stream |
| C | radius |
| K | steps |
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from distill_system.config.objective.ammd import ClosedFormCritic, CriticConfig, GradientCritic
from distill_system.objectives.moving_average import MovingAverage

SMALLEST_SINGULAR_VALUE = 5e-6
"""Of a matrix of Frobenius norm 1; smaller ones are not brought up to 1."""
LARGEST_STRETCH = 1.6977
"""Beyond it the scaled iteration squeezes large singular values so far that rounding shows."""
MOMENT_NOISE = 1e-6
"""Frobenius norm under which a float32 moment of unit features is rounding noise, answered by 0.

The distance is a norm, with a gradient of constant size however small the moment: without a floor
a student that equals its teacher would be pushed about by rounding errors.
"""


def polar_factor(matrix: Float[Tensor, "F E"]) -> Float[Tensor, "F E"]:
    """The orthogonal factor U V^T of matrix = U S V^T, by scaled cubic Newton-Schulz iteration.

    Shapes: float [F, E]; returns [F, E], zero for a zero matrix. A singular value below
    SMALLEST_SINGULAR_VALUE of the Frobenius norm comes out between 0 and 1; it carries no distance.
    Cost: two products of the smaller side in each of about 17 iterations.
    Source: Chen and Chow 2014, "A stable scaling of Newton-Schulz for improving the sign function
        computation": each step's cubic is stretched as far as the smallest singular value allows.
        Differs: the input is scaled by its Frobenius norm, the smallest value is assumed.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    factor = wide / wide.norm().clamp_min(torch.finfo(wide.dtype).tiny)
    # All singular values are in [lower, 1]; each cubic maps that interval into itself and lifts its
    # lower end. The stretch at which both ends land on one value lifts it fastest.
    lower = SMALLEST_SINGULAR_VALUE
    while 1.0 - lower > torch.finfo(wide.dtype).eps:
        stretch = min(math.sqrt(3.0 / (1.0 + lower + lower**2)), LARGEST_STRETCH)
        linear, cubic = 1.5 * stretch, 0.5 * stretch**3
        factor = linear * factor - cubic * (factor @ factor.T) @ factor
        lower = linear * lower - cubic * lower**3
    return factor if matrix.shape[0] <= matrix.shape[1] else factor.T


def best_response(
    moment_FE: Float[Tensor, "F E"], *, ball: str, radius: float
) -> Float[Tensor, "F E"]:
    """The critic of the ball that maximises <phi, M>: C M/|M|_F, or C U V^T for the spectral ball.

    Shapes: [F, E] -> [F, E]; zero where |M|_F is at most MOMENT_NOISE.
    """
    norm = moment_FE.norm()
    # torch.where, not if: a comparison in Python would make a GPU wait at each step
    heard_FE = torch.where(norm > MOMENT_NOISE, moment_FE, torch.zeros_like(moment_FE))
    if ball == "spectral":
        return radius * polar_factor(heard_FE)
    return radius * heard_FE / norm.clamp_min(MOMENT_NOISE)


def moment_distance(moment_FE: Float[Tensor, "F E"], *, ball: str, radius: float) -> float:
    """sup over the ball of <phi, M>: radius times the nuclear (spectral ball) or Frobenius norm."""
    if ball == "spectral":
        return radius * float(torch.linalg.svdvals(moment_FE).sum())
    return radius * float(moment_FE.norm())


def project(critic_FE: Float[Tensor, "F E"], *, ball: str, radius: float) -> Float[Tensor, "F E"]:
    """The nearest matrix of the ball (Frobenius distance)."""
    if ball == "frobenius":
        return critic_FE * min(1.0, radius / max(float(critic_FE.norm()), 1e-30))
    left, singular, right = torch.linalg.svd(critic_FE, full_matrices=False)
    return (left * singular.clamp_max(radius)) @ right


@runtime_checkable
class Critic(Protocol):
    """One player of the inner maximisation."""

    def respond(self, moment_FE: Float[Tensor, "F E"]) -> Float[Tensor, "F E"]:
        """The critic matrix for this step's moment, detached [F, E]."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the next response depends on."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what state_dict gave."""


class BestResponseCritic:
    """Closed form, made anew each step, of this step's moment or of a moving average."""

    def __init__(self, config: ClosedFormCritic) -> None:
        self.config = config
        self.moments = MovingAverage(config.average)

    def respond(self, moment_FE: Float[Tensor, "F E"]) -> Float[Tensor, "F E"]:
        """C M/|M|_F or C polar(M)."""
        heard_FE = self.moments.update(moment_FE)
        return best_response(heard_FE, ball=self.config.ball, radius=self.config.radius)

    def state_dict(self) -> dict[str, Tensor]:
        """The moving average; empty where the response depends on this step alone."""
        return self.moments.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back the moving average."""
        self.moments.load_state_dict(state)


class AscentCritic:
    """K projected ascent steps per learner step; <phi, M> is linear: its gradient is M itself."""

    def __init__(self, config: GradientCritic) -> None:
        self.config = config
        self.critic_FE: Tensor | None = None

    def respond(self, moment_FE: Float[Tensor, "F E"]) -> Float[Tensor, "F E"]:
        """Walk K steps of length step_size x radius along M/|M|_F, projected after each."""
        config = self.config
        critic_FE = torch.zeros_like(moment_FE)
        if self.critic_FE is not None and config.keep:
            critic_FE = self.critic_FE.to(moment_FE)
        # <phi, M> is linear in phi: its gradient is the same at every step of the walk
        uphill_FE = best_response(moment_FE, ball="frobenius", radius=1.0)
        for _ in range(config.steps):
            critic_FE = project(
                critic_FE + config.step_size * config.radius * uphill_FE,
                ball=config.ball,
                radius=config.radius,
            )
        self.critic_FE = critic_FE
        return critic_FE

    def state_dict(self) -> dict[str, Tensor]:
        """The critic matrix, once a step has been made."""
        return {} if self.critic_FE is None else {"critic": self.critic_FE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back the critic matrix."""
        self.critic_FE = state.get("critic")


def build_critic(config: CriticConfig) -> Critic:
    """The critic that the configuration names."""
    if isinstance(config, ClosedFormCritic):
        return BestResponseCritic(config)
    return AscentCritic(config)
