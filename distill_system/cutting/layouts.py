"""How the tensors of a decoder lie: along which axis its heads, neurons and hidden units stand.

A group is a kind of part that a cut leaves out:

hidden   units of the residual stream, the same in every block
neurons  inside a block's MLP
heads    query heads of a block, each as many rows as a head is wide
keys     heads of keys and values, of which several query heads may share one
triples  query, key and value of a head, one behind the other (GPT-NeoX)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distill_system.errors import ModelError
from distill_system.language_model import LanguageModel

Axis = tuple[str, ...]
"""The groups that stand one behind another along an axis; none: the axis is left whole."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Of one module: the groups along its outputs, which its bias has too, and its inputs."""

    outputs: Axis
    inputs: Axis = ()


_INTO_STREAM = Layout(("hidden",), ("heads",)), Layout(("hidden",), ("neurons",))
_TABLE = Layout((), ("hidden",))

LAYOUTS = {
    "q_proj": Layout(("heads",), ("hidden",)),
    "k_proj": Layout(("keys",), ("hidden",)),
    "v_proj": Layout(("keys",), ("hidden",)),
    "qkv_proj": Layout(("heads", "keys", "keys"), ("hidden",)),
    "query_key_value": Layout(("triples",), ("hidden",)),
    "attn.c_attn": Layout(("heads", "heads", "heads"), ("hidden",)),
    "o_proj": _INTO_STREAM[0],
    "out_proj": _INTO_STREAM[0],
    "attention.dense": _INTO_STREAM[0],
    "attn.c_proj": _INTO_STREAM[0],
    "gate_proj": Layout(("neurons",), ("hidden",)),
    "up_proj": Layout(("neurons",), ("hidden",)),
    "gate_up_proj": Layout(("neurons", "neurons"), ("hidden",)),
    "dense_h_to_4h": Layout(("neurons",), ("hidden",)),
    "c_fc": Layout(("neurons",), ("hidden",)),
    "fc1": Layout(("neurons",), ("hidden",)),
    "down_proj": _INTO_STREAM[1],
    "dense_4h_to_h": _INTO_STREAM[1],
    "mlp.c_proj": _INTO_STREAM[1],
    "fc2": _INTO_STREAM[1],
    "embed_tokens": _TABLE,
    "embed_positions": _TABLE,
    "embed_in": _TABLE,
    "wte": _TABLE,
    "wpe": _TABLE,
    "lm_head": _TABLE,
    "embed_out": _TABLE,
}
"""By the last parts of a module's name, weights as [outputs, inputs]."""

_WITHOUT_OWN_WIDTH = ("gpt2", "opt", "gpt_neox", "qwen2", "phi3", "granite", "olmo2", "olmo3")
"""Families whose heads are as wide as hidden_size / num_attention_heads, for one reader at least:
a cut of the one without the other would change what the heads compute."""

_UNKNOWN = {
    "falcon": "its queries, keys and values lie in three ways",
    "cohere": "vLLM derives the width of its heads, and its norms have no layout here",
    "cohere2": "vLLM derives the width of its heads",
    "smollm3": "vLLM derives the width of its heads",
}


def find_layout(name: str) -> Layout | None:
    """Of the module of a name; None of a norm, and of what the table does not know."""
    parts = name.split(".")
    return LAYOUTS.get(".".join(parts[-2:])) or LAYOUTS.get(parts[-1])


def require_layouts(model: LanguageModel, name: str) -> None:
    """Refuse a cut in width, or by importance, of a model with a matrix of no known layout.

    Raises: ModelError naming it.
    """
    family = model.config.model_type
    unknown = [
        module
        for module, parameter in _matrices(model)
        if find_layout(module) is None and parameter.shape[0] > 1
    ]
    why = _UNKNOWN.get(family) or (f"no layout is known of {unknown[0]}" if unknown else "")
    if getattr(model.config, "word_embed_proj_dim", None) not in (None, model.config.hidden_size):
        why = "its embeddings have a width of their own (word_embed_proj_dim)"
    if why:
        raise ModelError(
            f"{name}: a model of type {family} cannot be cut in width, nor measured: {why}. Cut "
            "its depth alone, evenly (--layers), or choose another teacher"
        )


def keeps_transposed(module: Any) -> bool:
    """Whether a linear layer keeps its matrix as [inputs, outputs], as GPT-2's do."""
    return type(module).__name__ == "Conv1D"


def num_inputs(module: Any) -> int:
    """Inputs of a linear layer."""
    rows, columns = module.weight.shape
    return int(rows if keeps_transposed(module) else columns)


def head_size(config: Any) -> int:
    """Width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def derives_head_size(config: Any) -> bool:
    """Whether a head is hidden_size / num_attention_heads wide whatever config.json says."""
    return config.model_type in _WITHOUT_OWN_WIDTH


def _matrices(model: LanguageModel) -> list[tuple[str, Any]]:
    """The modules that hold a matrix, by name, with it."""
    return [
        (name.removesuffix(".weight"), parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
    ]
