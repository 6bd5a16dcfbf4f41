"""What a critic sees of an action: a unit row of the teacher's input embeddings, narrowed.

With P of orthonormal columns, f(s, y) = g(s)^T phi P^T e(y) is the critic phi P^T of the whole
space: the same norms, the same bound |f| <= C, a smaller class. Its expectations need P^T ebar
alone, so that the scorer ships R numbers a token instead of E, and the products with all action
embeddings, AMMD's dearest, shrink from E to R columns.

Axes: V vocabulary, E width of the teacher's input embeddings, R dimensions that are kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from distill_system.objectives.state_features import draw_gaussian
from distill_system.objectives.vocabulary import unit_rows

SEED = 0


def make_action_embeddings(
    embeddings_VE: Float[Tensor, "V E"], dimension: int | None
) -> Float32[Tensor, "V R"]:
    """Float32 unit rows [V, E], or their part in a fixed random subspace [V, R] where R < E.

    The subspace depends on E and R alone: scorer and learner ranks that make it for themselves
    hold the same. dimension: R, the most columns wanted; None keeps all.
    """
    actions_VE = unit_rows(embeddings_VE.detach())
    if dimension is None or dimension >= actions_VE.shape[1]:
        return actions_VE
    return actions_VE @ draw_basis(actions_VE.shape[1], dimension).to(actions_VE)


def draw_basis(size: int, dimension: int) -> Float64[Tensor, "{size} {dimension}"]:
    """Orthonormal columns, float64 [size, dimension], with the signs that make QR unique."""
    columns_ER, triangle_RR = torch.linalg.qr(draw_gaussian(size, dimension, SEED).double())
    # QR is unique up to signs, and libraries choose them differently.
    return columns_ER * triangle_RR.diagonal().sign()
