"""Tokens drawn from logits, each sequence with its own temperature, truncation and random numbers.

Axes: B sequences, V tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def draw_uniforms(seed: int, count: int) -> np.ndarray:
    """The random numbers of one request, one for each token: float64 [count] in [0, 1).

    They follow from the seed alone: neither the batch nor the device changes them.
    """
    return np.random.Generator(np.random.Philox(seed)).random(count)


def draw_tokens(
    logits_BV: Tensor, uniforms_B: Tensor, temperatures_B: Tensor, top_ps_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token for each sequence, and its log-probability under what it was drawn from.

    uniforms_B: float64 in [0, 1).  temperatures_B: 0 takes the most likely token, and says its
    log-probability at temperature 1.  top_ps_B: nucleus truncation; None where all are 1.
    Returns: int64 [B]; float32 [B], nats. Nothing here waits for the device.
    """
    is_greedy_B = temperatures_B == 0.0
    scales_B1 = torch.where(is_greedy_B, 1.0, temperatures_B)[:, None]
    logprobs_BV = (logits_BV.float() / scales_B1).log_softmax(-1)
    if top_ps_B is not None:
        logprobs_BV = _truncate(logprobs_BV, torch.where(is_greedy_B, 1.0, top_ps_B))
    # By the inverse of the distribution function, in float64: a float32 sum over a large vocabulary
    # would round tokens of little mass away.
    mass_BV = logprobs_BV.double().exp().cumsum(-1)
    total_B = mass_BV[:, -1]
    # Below the total, so that the first token whose sum lies above it exists and has mass.
    below_B = torch.minimum(uniforms_B * total_B, total_B.nextafter(torch.zeros_like(total_B)))
    drawn_B = torch.searchsorted(mass_BV, below_B[:, None], right=True)[:, 0]
    tokens_B = torch.where(is_greedy_B, logits_BV.argmax(-1), drawn_B)
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0]


def _truncate(logprobs_BV: Tensor, top_ps_B: Tensor) -> Tensor:
    """The fewest most likely tokens whose probabilities reach top_p, scaled up to sum to 1."""
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    mass_BV = sorted_BV.double().exp()
    more_likely_BV = mass_BV.cumsum(-1) - mass_BV
    is_cut_BV = more_likely_BV >= top_ps_B.double()[:, None]
    is_cut_BV[:, 0] = False
    is_cut_BV = torch.zeros_like(is_cut_BV).scatter(-1, order_BV, is_cut_BV)
    kept_BV = logprobs_BV.masked_fill(is_cut_BV, -torch.inf).log_softmax(-1)
    return torch.where((top_ps_B < 1.0)[:, None], kept_BV, logprobs_BV)
