"""Losses between two policies at one token, one file each: whole distributions in, [c] out.

A token loss is a plain function (config, chunk, rows) -> float32 [c], with graph to the chunk's
student log-probabilities alone. It keeps nothing of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from distill_system.config.objective.token_losses import (
    AdaptiveClipKlConfig,
    CrossEntropyConfig,
    FirstConfig,
    ForwardKlConfig,
    GeneralizedJsdConfig,
    InterpolatedCrossEntropyConfig,
    ReverseKlConfig,
    SinkhornConfig,
    SkewKlConfig,
    SkewReverseKlConfig,
    TokenLossConfig,
    TopKConfig,
    TotalVariationConfig,
)
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.token_losses.adaptive_clip_kl import adaptive_clip_kl
from distill_system.objectives.token_losses.cross_entropy import cross_entropy
from distill_system.objectives.token_losses.first import first
from distill_system.objectives.token_losses.generalized_jsd import generalized_jsd
from distill_system.objectives.token_losses.interpolated_cross_entropy import (
    interpolated_cross_entropy,
)
from distill_system.objectives.token_losses.kl import forward_kl, reverse_kl
from distill_system.objectives.token_losses.sinkhorn import sinkhorn
from distill_system.objectives.token_losses.skew_kl import skew_kl, skew_reverse_kl
from distill_system.objectives.token_losses.top_k import top_k
from distill_system.objectives.token_losses.total_variation import total_variation
from distill_system.objectives.vocabulary import ChunkLoss, VocabularyChunk

__all__ = ["bind_token_loss"]

TOKEN_LOSSES: dict[type, Callable[[Any, VocabularyChunk, TokenRows], Tensor]] = {
    CrossEntropyConfig: cross_entropy,
    InterpolatedCrossEntropyConfig: interpolated_cross_entropy,
    ForwardKlConfig: forward_kl,
    ReverseKlConfig: reverse_kl,
    GeneralizedJsdConfig: generalized_jsd,
    TotalVariationConfig: total_variation,
    SkewKlConfig: skew_kl,
    SkewReverseKlConfig: skew_reverse_kl,
    TopKConfig: top_k,
    FirstConfig: first,
    SinkhornConfig: sinkhorn,
    AdaptiveClipKlConfig: adaptive_clip_kl,
}


def bind_token_loss(config: TokenLossConfig, rows: TokenRows) -> ChunkLoss:
    """The loss that the configuration names, for the chunks of one stream."""
    loss = TOKEN_LOSSES[type(config)]
    return lambda chunk: loss(config, chunk, rows)
