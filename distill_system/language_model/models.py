"""Make, load and check a causal language model.

Axes: V rows of the unembedding (padded vocabularies included), H hidden size, L length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distill_system.config.model import ArchitectureConfig
from distill_system.errors import ModelError

LanguageModel = Any
"""A transformers PreTrainedModel for causal language modelling; the library ships no types."""

LINEAR_READ_TOLERANCE = 1e-3
"""Largest difference between the model's own logits and hidden state x unembedding, relative."""


def unembedding(model: LanguageModel) -> Tensor:
    """The matrix that turns a final hidden state into logits, [V, H]."""
    return model.get_output_embeddings().weight


def build_language_model(
    architecture: ArchitectureConfig,
    *,
    vocab_size: int,
    pad_token_id: int,
    bos_token_id: int | None,
    eos_token_id: int,
    seed: int,
) -> LanguageModel:
    """A Llama-shaped model with random float32 weights, the same for the same seed."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_heads,
        max_position_embeddings=architecture.max_position_embeddings,
        tie_word_embeddings=architecture.tie_word_embeddings,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def load_language_model(
    path: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> LanguageModel:
    """Load a pretrained causal language model in evaluation mode (no dropout).

    Raises: ModelError if it cannot be loaded, or is read otherwise than final hidden state times
        unembedding (logit scaling, soft caps, biases), which moment matching relies on.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load a causal language model from {path!r}: {error}. Give a folder with "
            "config.json and *.safetensors, or a model name of the Hugging Face hub"
        ) from error
    model = model.to(device).eval()
    check_linear_read(model, path)
    return model


@torch.no_grad()
def check_linear_read(model: LanguageModel, path: str) -> None:
    """Refuse a model whose logits are not finite, or not its final hidden state x unembedding.

    Raises: ModelError, with the difference seen.
    """
    device = unembedding(model).device
    ids_BL = torch.arange(3, 11, device=device)[None] % unembedding(model).shape[0]
    logits_LV = model(input_ids=ids_BL, use_cache=False).logits[0].float()
    if not logits_LV.isfinite().all():
        raise ModelError(
            f"{path!r} ({type(model).__name__}): expected finite logits, got NaN or infinity. Its "
            "weights are damaged, or too large for the precision they are loaded in"
        )
    hidden_LH = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[0]
    read_LV = (hidden_LH @ unembedding(model).T).float()
    difference = float((logits_LV - read_LV).abs().max() / logits_LV.abs().max().clamp_min(1e-6))
    tolerance = LINEAR_READ_TOLERANCE if read_LV.dtype == hidden_LH.dtype else 2e-2
    if difference > tolerance:
        raise ModelError(
            f"{path!r} ({type(model).__name__}): expected logits = final hidden state x "
            f"unembedding, got a relative difference of {difference:.2e}. Models with logit "
            "scaling, soft caps or output biases are not supported yet"
        )
