"""Tokens drawn from logits, each sequence with its own temperature, truncation and random numbers.

Axes: B sequences, V tokens, K most likely ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def draw_uniforms(seed: int, count: int) -> np.ndarray:
    """The random numbers of one request, one for each token: float64 [count] in [0, 1).

    They follow from the seed alone: neither the batch nor the device changes them.
    """
    return np.random.Generator(np.random.Philox(seed)).random(count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """What each sequence samples from; see Sampling.

    top_ps_B, min_ps_B: float32.  top_ks_B: int64, V or more where all are kept.
    num_told: how many of the most likely tokens are told, where they are kept.
    """

    top_ps_B: Tensor
    top_ks_B: Tensor
    min_ps_B: Tensor
    num_told: int = 0

    def truncates(self, vocabulary: int) -> Tensor:
        """Whether each sequence's distribution may be cut, bool [B]."""
        return (self.top_ps_B < 1.0) | (self.top_ks_B < vocabulary) | (self.min_ps_B > 0.0)


def draw_tokens(
    logits_BV: Tensor,
    uniforms_B: Tensor,
    temperatures_B: Tensor,
    truncation: Truncation | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token for each sequence, its log-probability under what it was drawn from, and what else
    could have been drawn.

    uniforms_B: float64 in [0, 1).  temperatures_B: 0 takes the most likely token, and says its
    log-probability at temperature 1.  truncation: None where nothing is cut off.
    Returns: int64 [B]; float32 [B], nats; int64 [B, K], K of truncation, the tokens kept and -1
        behind them. Nothing here waits for the device.
    """
    kept_BK = logits_BV.new_empty((logits_BV.shape[0], 0), dtype=torch.int64)
    is_greedy_B = temperatures_B == 0.0
    scales_B1 = torch.where(is_greedy_B, 1.0, temperatures_B)[:, None]
    logprobs_BV = (logits_BV.float() / scales_B1).log_softmax(-1)
    if truncation is not None:
        logprobs_BV, kept_BK = _truncate(logprobs_BV, truncation, is_greedy_B)
    # By the inverse of the distribution function, in float64: a float32 sum over a large vocabulary
    # would round tokens of little mass away.
    mass_BV = logprobs_BV.double().exp().cumsum(-1)
    total_B = mass_BV[:, -1]
    # Below the total, so that the first token whose sum lies above it exists and has mass.
    below_B = torch.minimum(uniforms_B * total_B, total_B.nextafter(torch.zeros_like(total_B)))
    drawn_B = torch.searchsorted(mass_BV, below_B[:, None], right=True)[:, 0]
    tokens_B = torch.where(is_greedy_B, logits_BV.argmax(-1), drawn_B)
    return tokens_B, logprobs_BV.gather(-1, tokens_B[:, None])[:, 0], kept_BK


def _truncate(
    logprobs_BV: Tensor, truncation: Truncation, is_greedy_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens likely enough, of these the top_k, of these the fewest whose mass reaches top_p,
    scaled up to sum to 1; and the first of them, -1 behind."""
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    mass_BV = sorted_BV.double().exp()
    ranks_V = torch.arange(logprobs_BV.shape[1], device=logprobs_BV.device)
    least_B1 = sorted_BV[:, :1] + truncation.min_ps_B[:, None].log()
    is_cut_BV = (sorted_BV < least_B1) | (ranks_V >= truncation.top_ks_B[:, None])
    left_BV = mass_BV.masked_fill(is_cut_BV, 0.0)
    # What nothing is cut from sums to 1 already, but for rounding.
    total_B1 = torch.where(is_cut_BV.any(-1), left_BV.sum(-1), 1.0)[:, None]
    more_likely_BV = left_BV.cumsum(-1) - left_BV
    reaches_BV = more_likely_BV >= truncation.top_ps_B.double()[:, None] * total_B1
    is_cut_BV |= reaches_BV & (truncation.top_ps_B < 1.0)[:, None]  # 1 is reached by rounding
    is_cut_BV[:, 0] = False
    told = slice(0, truncation.num_told)
    kept_BK = order_BV[:, told].masked_fill(is_cut_BV[:, told], -1)
    is_cut_BV = torch.zeros_like(is_cut_BV).scatter(-1, order_BV, is_cut_BV)
    kept_BV = logprobs_BV.masked_fill(is_cut_BV, -torch.inf).log_softmax(-1)
    is_truncated_B = truncation.truncates(logprobs_BV.shape[1]) & ~is_greedy_B
    return torch.where(is_truncated_B[:, None], kept_BV, logprobs_BV), kept_BK
