"""Divergences between two distributions of which the whole log-probabilities are there.

Shapes: two float32 [c, V], every entry finite, each row summing to 1 as probabilities -> [c].
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float32
from torch import Tensor

MASKED_LOGPROB = -1e4
"""Stands for log 0 among log-probabilities: its exponential is 0, and 0 times it is still 0."""


def kl_divergence(
    first_cV: Float32[Tensor, "c V"], second_cV: Float32[Tensor, "c V"]
) -> Float32[Tensor, " c"]:
    """KL(first || second) = sum_y first(y) (log first(y) - log second(y)), nats."""
    return (first_cV.exp() * (first_cV - second_cV)).sum(dim=-1)


def log_mixture(
    first_cV: Float32[Tensor, "c V"], second_cV: Float32[Tensor, "c V"], *, first_weight: float
) -> Float32[Tensor, "c V"]:
    """log(w first + (1 - w) second), with 0 < w < 1, without leaving log space."""
    # log1p(-w), since 1 - w loses the digits of a small w
    return torch.logaddexp(first_cV + math.log(first_weight), second_cV + math.log1p(-first_weight))


def jensen_shannon(
    teacher_cV: Float32[Tensor, "c V"], student_cV: Float32[Tensor, "c V"], *, mixture_weight: float
) -> Float32[Tensor, " c"]:
    """w KL(teacher || m) + (1 - w) KL(student || m) with m = w teacher + (1 - w) student, nats.

    At most -w log w - (1 - w) log(1 - w), which is log 2 at w = 1/2.
    """
    mixture_cV = log_mixture(teacher_cV, student_cV, first_weight=mixture_weight)
    teacher_part = kl_divergence(teacher_cV, mixture_cV)
    return mixture_weight * teacher_part + (1.0 - mixture_weight) * kl_divergence(
        student_cV, mixture_cV
    )
