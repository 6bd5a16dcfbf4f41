"""A model's sizes in numbers, and the model itself without weights, from its configuration alone.

It is built on torch's meta device, so the count is transformers' own for every family; that takes a
fraction of a second for 70 billion parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, LlamaConfig

from distill_system.config.model import ArchitectureConfig
from distill_system.errors import ModelError
from distill_system.language_model import (
    LanguageModel,
    choose_attention,
    is_gguf,
    may_hold_two_matrices,
    model_class,
    tie_weights,
    unembedding,
)
from distill_system.learner.sharding import find_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What is known of a model without its weights.

    family: transformers' model_type. vocabulary: rows of the unembedding, padding included.
    num_parameters: tied matrices once. largest_parameter: numbers of the largest. hidden_size: of
        the blocks. embedding_size, row_size: columns of the input embeddings and of the
        unembedding, the hidden size but for a few.
    key_size: key heads x head size. config: transformers' configuration.
    """

    name: str
    family: str
    vocabulary: int
    hidden_size: int
    embedding_size: int
    row_size: int
    key_size: int
    num_blocks: int
    num_parameters: int
    largest_parameter: int
    trust_remote_code: bool = False
    config: Any = field(repr=False, compare=False)


def read_shape(path: str, *, key: str, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a folder's model, or of a hub model whose config.json has been fetched.

    key: where the path stands in the configuration, for the message.
    Raises: ModelError if there is no config.json here; nothing is fetched.
    """
    file = Path(path)
    where = {"gguf_file": file.name} if is_gguf(path) and file.is_file() else {}
    try:
        config = AutoConfig.from_pretrained(
            str(file.parent) if where else path,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **where,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{key}={path!r}: expected a folder with the config.json of a language model, or a hub "
            "model whose config.json is in this machine's cache, found neither. Fetch it alone "
            f"with `hf download {path} config.json`, or give the model's folder. transformers "
            f"said: {str(error).strip().splitlines()[0]}"
        ) from error
    return measure_shape(config, name=path, trust_remote_code=trust_remote_code)


def architecture_shape(architecture: ArchitectureConfig, *, vocabulary: int) -> ModelShape:
    """The shape of a model that starts from random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_heads,
        tie_word_embeddings=architecture.tie_word_embeddings,
        # The defaults lie outside a small vocabulary.
        bos_token_id=None,
        eos_token_id=None,
    )
    return measure_shape(config, name="from random weights")


def measure_shape(config: Any, *, name: str, trust_remote_code: bool = False) -> ModelShape:
    """Count a transformers configuration's parameters.

    Raises: ModelError if the model is no causal language model of repeated blocks.
    """
    model = _build(config, trust_remote_code=trust_remote_code)
    inputs, text = model.get_input_embeddings().weight, config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return ModelShape(
        name=name,
        family=text.model_type,
        vocabulary=unembedding(model).shape[0],
        hidden_size=text.hidden_size,
        embedding_size=inputs.shape[1],
        row_size=unembedding(model).shape[1],
        key_size=key_heads * head_size,
        num_blocks=len(find_blocks(model)),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        largest_parameter=max(parameter.numel() for parameter in model.parameters()),
        trust_remote_code=trust_remote_code,
        config=config,
    )


def build_empty(shape: ModelShape) -> LanguageModel:
    """The model in evaluation mode: float32 parameters on the meta device, real buffers."""
    return _build(shape.config, trust_remote_code=shape.trust_remote_code)


def _build(config: Any, *, trust_remote_code: bool) -> LanguageModel:
    with init_empty_weights(include_buffers=False):
        model = model_class(config).from_config(
            config,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            attn_implementation=choose_attention(config),
        )
    tie_weights(model, two_matrices=may_hold_two_matrices(config))
    return model.eval()
