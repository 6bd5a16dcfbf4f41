"""A model's sizes in numbers, from its configuration alone: no weight is read, none is made.

The parameters are counted on a model of torch's meta device, so the count is transformers' own
for every family; that takes a fraction of a second for 70 billion parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from distill_system.config.model import ArchitectureConfig
from distill_system.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What memory depends on.

    family: transformers' model_type. vocabulary: rows of the unembedding, padding included.
    num_parameters: tied matrices once. num_embedding_parameters: input embeddings and unembedding.
    num_matrix_parameters: of the two-dimensional weights that are no embeddings.
    num_block_parameters: of the largest transformer block.
    hidden_size: of the blocks. embedding_size, row_size: columns of the input embeddings and of the
        unembedding, the hidden size but for a few. query_size, key_size: heads x head size.
    adapter_rows: what an adapter of rank 1 would add, inputs plus outputs of every linear layer of
        all blocks, by the last part of the layer's name.
    """

    name: str
    family: str
    vocabulary: int
    hidden_size: int
    embedding_size: int
    row_size: int
    intermediate_size: int
    query_size: int
    key_size: int
    num_heads: int
    num_blocks: int
    num_parameters: int
    num_embedding_parameters: int
    num_matrix_parameters: int
    num_block_parameters: int
    adapter_rows: Mapping[str, int]


def read_shape(path: str, *, key: str, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a folder's model, or of a hub model whose config.json has been fetched.

    Args:
        key: where the path stands in the configuration, for the message.

    Raises: ModelError if there is no config.json here; nothing is fetched.
    """
    try:
        config = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
    blocks = _find_blocks(model, name)
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embeddings = {id(weight): weight.numel() for weight in (inputs, outputs)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    config = config.get_text_config()
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return ModelShape(
        name=name,
        family=config.model_type,
        vocabulary=outputs.shape[0],
        hidden_size=config.hidden_size,
        embedding_size=inputs.shape[1],
        row_size=outputs.shape[1],
        intermediate_size=_intermediate_size(config),
        query_size=config.num_attention_heads * head_size,
        key_size=key_heads * head_size,
        num_heads=config.num_attention_heads,
        num_blocks=len(blocks),
        num_parameters=_count(model),
        num_embedding_parameters=sum(embeddings.values()),
        num_matrix_parameters=sum(p.numel() for p in matrices),
        num_block_parameters=max(map(_count, blocks)),
        adapter_rows=_adapter_rows(blocks),
    )


def _find_blocks(model: Any, name: str) -> list[torch.nn.Module]:
    """The modules that transformers says must not be split over devices."""
    classes = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in classes]
    if not blocks:
        raise ModelError(
            f"{name!r} ({type(model).__name__}): expected a causal language model of repeated "
            "blocks (Llama, Qwen, GPT-2, OPT, Gemma, Mistral and their like), found none"
        )
    return blocks


def _intermediate_size(config: Any) -> int:
    """Width inside each MLP, under the name that the family has for it."""
    for field in ("intermediate_size", "ffn_dim", "n_inner"):
        value = getattr(config, field, None)
        if value is not None:
            return int(value)
    return 4 * int(config.hidden_size)  # GPT-2's meaning of n_inner=None


def _adapter_rows(blocks: Sequence[torch.nn.Module]) -> dict[str, int]:
    rows: Counter[str] = Counter()
    for name, layer in (pair for block in blocks for pair in block.named_modules()):
        if isinstance(layer, torch.nn.Linear | Conv1D):
            rows[name.rpartition(".")[2]] += sum(layer.weight.shape)
    return dict(rows)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
