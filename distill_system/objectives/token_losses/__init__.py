"""Losses between two policies at one token, one file each: whole distributions in, [c] out.

A token loss is a plain function (config, chunk, rows) -> float32 [c], with graph to the chunk's
student log-probabilities alone. It keeps nothing of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from distill_system.config.objective import (
    CrossEntropyConfig,
    ForwardKlConfig,
    ReverseKlConfig,
    TokenLossConfig,
)
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.token_losses.cross_entropy import cross_entropy
from distill_system.objectives.token_losses.kl import forward_kl, reverse_kl
from distill_system.objectives.vocabulary import ChunkLoss, VocabularyChunk

__all__ = ["bind_token_loss"]

TOKEN_LOSSES: dict[type, Callable[[Any, VocabularyChunk, TokenRows], Tensor]] = {
    CrossEntropyConfig: cross_entropy,
    ForwardKlConfig: forward_kl,
    ReverseKlConfig: reverse_kl,
}


def bind_token_loss(config: TokenLossConfig, rows: TokenRows) -> ChunkLoss:
    """The loss that the configuration names, for the chunks of one stream."""
    loss = TOKEN_LOSSES[type(config)]
    return lambda chunk: loss(config, chunk, rows)
