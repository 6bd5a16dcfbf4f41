"""A critic that does not answer back, so that a gradient has one meaning."""

from __future__ import annotations

from torch import Tensor


class FixedCritic:
    """Implements objectives.critics.Critic with one matrix, [F, E].

    moment_FE: what it was told last.
    """

    def __init__(self, critic_FE: Tensor) -> None:
        self.critic_FE = critic_FE
        self.moment_FE: Tensor | None = None

    def respond(self, moment_FE: Tensor) -> Tensor:
        assert moment_FE.shape == self.critic_FE.shape, "the moment has the critic's axes"
        assert not moment_FE.requires_grad, "a critic is no part of the student's gradient"
        self.moment_FE = moment_FE
        return self.critic_FE

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        assert not state, "nothing depends on earlier steps"
