"""What a critic sees of an action: its embedding, whole or in a fixed random subspace.

With P of orthonormal columns, f(s, y) = g(s)^T phi P^T e(y) is the critic phi P^T of the whole
space: the same norms, the same bound |f| <= C, a smaller class. Its expectations need P^T ebar
alone, and products with all action embeddings, AMMD's dearest, shrink from E to R columns.

Axes: N tokens, V vocabulary, E action-embedding size, R dimensions that are kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distill_system.errors import ConfigError
from distill_system.objectives.rows import PolicyHeads
from distill_system.objectives.state_features import draw_gaussian

SEED = 0


class ActionSpace:
    """The subspace is drawn once, from a fixed seed: it is no state."""

    def __init__(self, dimension: int | None) -> None:
        self.dimension = dimension
        self._basis_ER: Tensor | None = None
        self._embeddings_VR: Tensor | None = None

    def narrow_heads(self, heads: PolicyHeads) -> PolicyHeads:
        """The same heads with action embeddings [V, R]; made once, the embeddings are frozen.

        Raises: ConfigError if R is not below E.
        """
        if self.dimension is None:
            return heads
        if self._embeddings_VR is None:
            embeddings_VE = heads.action_embeddings_VE
            self._basis_ER = _draw_basis(embeddings_VE.shape[1], self.dimension).to(embeddings_VE)
            self._embeddings_VR = embeddings_VE @ self._basis_ER
        return replace(heads, action_embeddings_VE=self._embeddings_VR)

    def narrow(self, expected_NE: Tensor) -> Tensor:
        """P^T ebar of each row, [N, R]; narrow_heads comes first."""
        return expected_NE if self._basis_ER is None else expected_NE @ self._basis_ER


def _draw_basis(size: int, dimension: int) -> Tensor:
    """Orthonormal columns [E, R], signs made unique so that all ranks hold the same."""
    if dimension >= size:
        raise ConfigError(
            f"action_dimension must be below the action embeddings' size {size}, got {dimension}; "
            "set distill.objective.action_dimension=null to use them whole"
        )
    columns_ER, triangle_RR = torch.linalg.qr(draw_gaussian(size, dimension, SEED).double())
    return columns_ER * triangle_RR.diagonal().sign()
