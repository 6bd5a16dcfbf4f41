"""Make, load and check a causal language model.

Axes: V tokens, H hidden size, L length.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from distill_system.config.model import ArchitectureConfig
from distill_system.errors import ModelError
from distill_system.language_model.configuration_files import read_configuration
from distill_system.language_model.encoder_decoder import (
    find_decoder_start,
    model_class,
    read_beside,
    read_one,
)
from distill_system.language_model.families import find_family, logit_cap, logit_scale
from distill_system.language_model.packed_attention import (
    PACKED_ATTENTION,
    PackedLayout,
    choose_attention,
    read_line,
)
from distill_system.language_model.quantised import is_quantised
from distill_system.language_model.weight_files import require_all_tensors

LanguageModel = Any
"""A transformers PreTrainedModel for causal language modelling; the library ships no types."""

LINEAR_READ_TOLERANCE = 1e-3
"""Largest difference between the model's own logits and hidden state x unembedding, relative."""

PACKED_READ_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference between a sequence read alone and in a packed line, relative, by precision."""


def unembedding(model: LanguageModel, vocabulary_size: int | None = None) -> Tensor:
    """The matrix that turns a final hidden state into logits, [V, H].

    vocabulary_size: V, if the model has more rows than there are tokens; a gradient of the rows
    behind it is zero. None: every row.
    """
    return cut_rows(model.get_output_embeddings().weight, vocabulary_size)


def cut_rows(matrix: Tensor, vocabulary_size: int | None) -> Tensor:
    """The first rows of a padded matrix, without a copy; the matrix itself if there is no more."""
    return matrix if vocabulary_size in (None, matrix.shape[0]) else matrix[:vocabulary_size]


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
        attn_implementation=PACKED_ATTENTION,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def load_language_model(
    path: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> LanguageModel:
    """Load a pretrained language model in evaluation mode (no dropout).

    Raises: ModelError if it cannot be loaded, lacks tensors, is read otherwise beside other
        sequences than alone, or is read otherwise than final hidden state times unembedding, with
        the factor and cap that its family is known to have, which moment matching relies on.
    """
    try:
        config = read_configuration(path, trust_remote_code=trust_remote_code)
        find_family(config, repr(path))
        model, info = model_class(config).from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=choose_attention(config),
            device_map={"": device} if is_quantised(config) else None,  # it may not be moved later
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"cannot load a language model from {path!r}: {error}. Give a folder with "
            "config.json and *.safetensors, or a model name of the Hugging Face hub"
        ) from error
    require_all_tensors(model, info, repr(path))
    model = (model if is_quantised(config) else model.to(device)).eval()
    check_linear_read(model, path)
    check_packed_read(model, path)
    return model


@torch.no_grad()
def check_linear_read(model: LanguageModel, path: str) -> None:
    """Refuse a model whose logits are not finite, or not its final hidden state x unembedding.

    Raises: ModelError, with the difference seen.
    """
    logits_LV, hidden_LH = _read_both(model)
    logits_LV = logits_LV.float()
    if not logits_LV.isfinite().all():
        raise ModelError(
            f"{path!r} ({type(model).__name__}): expected finite logits, got NaN or infinity. Its "
            "weights are damaged, or too large for the precision they are loaded in"
        )
    read_LV, cap = (hidden_LH @ unembedding(model).T).float(), logit_cap(model.config)
    if cap is not None:
        read_LV = cap * torch.tanh(read_LV / cap)
    difference = float((logits_LV - read_LV).abs().max() / logits_LV.abs().max().clamp_min(1e-6))
    tolerance = LINEAR_READ_TOLERANCE if read_LV.dtype == hidden_LH.dtype else 2e-2
    if difference > tolerance:
        raise ModelError(
            f"{path!r} ({type(model).__name__}): expected logits = final hidden state x "
            f"unembedding, got a relative difference of {difference:.2e}. A factor or soft cap of "
            f"logits is not known of model_type={model.config.model_type!r}, and a bias of the "
            "unembedding of no family: choose a model of another one"
        )


def _read_both(model: LanguageModel) -> tuple[Tensor, Tensor]:
    """The model's own logits and our final hidden states of a few tokens, [L, V] and [L, H]."""
    if find_decoder_start(model) is not None:
        tokens = [token % unembedding(model).shape[0] for token in range(3, 11)]
        return read_one(model, tokens, tokens)
    device = unembedding(model).device
    ids_BL = torch.arange(3, 11, device=device)[None] % unembedding(model).shape[0]
    logits_LV = model(input_ids=ids_BL, use_cache=False).logits[0]
    return logits_LV, read_line(model, ids_BL, PackedLayout.build([8], device))


@torch.no_grad()
def check_packed_read(model: LanguageModel, path: str) -> None:
    """Refuse a model that reads a sequence otherwise beside others than alone.

    Raises: ModelError, with the difference seen.
    """
    name = f"{path!r} ({type(model).__name__})"
    if find_decoder_start(model) is not None:
        _require_near(*_read_two_ways(model), name, "below a longer one")
        return
    packs = model.config._attn_implementation == PACKED_ATTENTION
    if packs and not getattr(model, "_supports_attention_backend", False):
        raise ModelError(
            f"{name}: expected a model whose attention can be replaced, got one that computes it "
            "by itself. Its family cannot be read packed"
        )
    device = unembedding(model).device
    line_1T = torch.tensor([[9, 8, 7, *range(3, 11)]], device=device) % unembedding(model).shape[0]
    hidden_TH = read_line(model, line_1T, PackedLayout.build([3, 8], device))
    alone_LH = model.base_model(input_ids=line_1T[:, 3:], use_cache=False).last_hidden_state[0]
    alone_LH = alone_LH * logit_scale(model.config)
    _require_near(hidden_TH[3:], alone_LH, name, "in a packed line")


def _read_two_ways(model: LanguageModel) -> tuple[Tensor, Tensor]:
    """A sequence's hidden states below a longer one, and alone, [L, H] each."""
    rows = unembedding(model).shape[0]
    prompt, response = ([token % rows for token in tokens] for tokens in (range(3, 8), range(5, 9)))
    longer = [token % rows for token in range(3, 14)]
    beside_LH = read_beside(model, prompt, response, longer)
    return beside_LH, read_one(model, prompt, response)[1]


def _require_near(together_LH: Tensor, alone_LH: Tensor, name: str, where: str) -> None:
    difference = float((together_LH - alone_LH).abs().max() / alone_LH.abs().max())
    if difference > PACKED_READ_TOLERANCE.get(alone_LH.dtype, 5e-2):
        raise ModelError(
            f"{name}: expected a sequence's hidden states to be the same {where} as "
            f"alone, got a relative difference of {difference:.2e}. Its family carries something "
            "from one sequence to the next (a recurrent state, positions of its own); choose a "
            "model of a supported family"
        )
