"""A running mean of a matrix over learner steps, part of an objective's checkpointed state."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class MovingAverage:
    """mean_n = (1 - d) sum_k d^k x_(n-k) / (1 - d^n): exponential, and unbiased from the start.

    Source: the bias correction of Adam (arXiv 1412.6980, section 3). A decay d of 0 gives each
    matrix back as it came, and keeps nothing.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.sum: Tensor | None = None
        self.count = 0

    def update(self, matrix: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        """Take in one more matrix; returns the mean, of its shape, without graph."""
        matrix = matrix.detach()
        if self.decay == 0.0:
            return matrix
        past = torch.zeros_like(matrix) if self.sum is None else self.sum.to(matrix)
        self.sum = self.decay * past + (1.0 - self.decay) * matrix
        self.count += 1
        # the sum began at 0, which without this would pull the first means towards it
        return self.sum / (1.0 - self.decay**self.count)

    def state_dict(self) -> dict[str, Tensor]:
        """sum, of the matrix's shape, and count, float32 [1]; empty before the first matrix."""
        if self.sum is None:
            return {}
        return {"sum": self.sum, "count": torch.tensor([float(self.count)])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what state_dict gave."""
        self.sum = state.get("sum")
        self.count = int(state["count"].item()) if "count" in state else 0
