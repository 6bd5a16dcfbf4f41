"""Next-token loss on what was written: SFT on data, SeqKD on the teacher's text."""

from __future__ import annotations

from jaxtyping import Float32
from torch import Tensor

from distill_system.config.objective.token_losses import CrossEntropyConfig
from distill_system.objectives.rows import TokenRows
from distill_system.objectives.vocabulary import VocabularyChunk


def cross_entropy(
    config: CrossEntropyConfig, chunk: VocabularyChunk, rows: TokenRows
) -> Float32[Tensor, " c"]:
    """-log pi_theta(y_t | s_t), nats, [c].

    Source: on the teacher's text, sequence-level distillation (Kim and Rush 2016,
    arXiv 1606.07947). Differs: the text is sampled as rollout.sampling says, not searched by beam.
    """
    return -chunk.written_logprobs_c
