"""What keeps vLLM from sampling rows of a padded vocabulary; vLLM imports this by its name.

Axes: B sequences that are decoded, V rows of the model.
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondLogitsProcessor


class PaddingMask(LogitsProcessor, SecondLogitsProcessor):  # type: ignore[misc]  # untyped bases
    """Sets the logits of token ids from `additional_config["vocabulary_size"]` on to -inf.

    Sampling, greedy decoding and recorded log-probabilities then see the tokens alone. vLLM 0.32
    has two model runners, which call a processor with different arguments; this one serves both.
    """

    def __init__(self, vllm_config: VllmConfig, *_: object) -> None:
        self.vocabulary_size: int = vllm_config.additional_config["vocabulary_size"]

    def apply(self, logits: torch.Tensor, *_: object) -> torch.Tensor:
        """Mask logits float32 [B, V] in place."""
        logits[:, self.vocabulary_size :] = -torch.inf
        return logits

    def is_argmax_invariant(self) -> bool:
        """A padded row may be the largest: greedy decoding needs the mask too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """The mask is the same for every sequence."""
