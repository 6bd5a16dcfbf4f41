"""Settings of config.json that change a model's numbers: read alike by all, or refused by name.

transformers (which is what scorer and learner compute with) and vLLM (which writes the text) each
read config.json for themselves. What one of them passes over would give two different models of one
folder. The tables say, for the families that this house has read through, which values both
compute; tests/unit/language_model/test_settings.py holds them against the installed libraries: a
setting that either of them begins to read fails there until it stands here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distill_system.errors import ModelError

ACTIVATIONS = (
    "gelu",
    "gelu_fast",
    "gelu_new",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "sigmoid",
    "silu",
    "swish",
    "tanh",
)
"""Activation functions of an MLP without a gate that both compute, by their names in both."""

ROPE_SETTINGS = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": (
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""Kinds of rotary embedding that both compute, and what they read of each. Not dynamic and not
longrope: transformers changes them with the length of a sequence, vLLM once for all."""

ROPE_SETTINGS_OF_ONE = (
    "alpha",
    "is_deepseek_v4",
    "max_trained_positions",
    "mixed_b",
    "mrope_interleaved",
    "mrope_section",
    "rope_dim",
    "use_fope",
)
"""What vLLM reads of a rotary embedding and transformers does not."""

Allowed = Mapping[str, tuple[object, ...]]

EVERYWHERE: Allowed = {
    "block_configs": (None,),
    "dual_chunk_attention_config": (None,),
    "head_dtype": (None, "model"),
    "is_causal": (True,),
    "is_encoder_decoder": (None, False),
    "is_heterogeneous": (None, False),
    "use_bidirectional_attention": (None, False),
}
"""Of every family: the values of a setting that change nothing, or that both compute."""

_WHOLE_HEADS: Allowed = {
    "partial_rotary_factor": (None, 1.0),
    "rotary_emb_base": (None,),
    "rotary_emb_fraction": (None, 1.0),
    "rotary_pct": (None, 1.0),
}
"""Of families that turn all of each head: vLLM turns a part of it if these say so."""

FAMILIES: Mapping[str, Allowed] = {
    "llama": {
        **_WHOLE_HEADS,
        "bias": (None, False),
        "hidden_act": ("silu",),
        "logit_scale": (1.0,),
        "qkv_bias": (None, False),
    },
    "mistral": {
        **_WHOLE_HEADS,
        "ada_rms_norm_t_cond": (None, False),
        "attention_bias": (None, False),
        "bias": (None, False),
        "hidden_act": ("silu",),
        "llama_4_scaling": (None,),
        "logit_scale": (1.0,),
        "mlp_bias": (None, False),
        "qkv_bias": (None, False),
    },
    "qwen2": {**_WHOLE_HEADS, "hidden_act": ("silu",), "qk_norm": (None, False)},
    "qwen3": {
        **_WHOLE_HEADS,
        "attention_bias": (None, False),
        "hidden_act": ("silu",),
        "qk_norm": (None, False),
    },
    "gemma": {
        **_WHOLE_HEADS,
        "attention_bias": (None, False),
        "hidden_act": ("gelu", "gelu_pytorch_tanh"),
        "hidden_activation": (None, "gelu_pytorch_tanh"),
    },
    "gpt2": {
        "activation_function": ACTIVATIONS,
        "add_cross_attention": (None, False),
        "reorder_and_upcast_attn": (None, False),
        "scale_attn_by_inverse_layer_idx": (None, False),
        "scale_attn_weights": (True,),
    },
    "opt": {"activation_function": ACTIVATIONS},
}
"""Of each family that was read through: the same. Settings that stand nowhere are read alike
whatever their value, or by nobody."""

_COHERE: Allowed = {
    "attention_bias": (None, False),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (True,),
}

OTHER_FAMILIES: Mapping[str, Allowed] = {
    "gemma2": {"tie_word_embeddings": (True,)},
    "gemma3_text": {"attn_logit_softcapping": (None,)},
    "phi3": {
        "attention_bias": (None, False),
        "bias": (None, False),
        "layer_types": (None,),
        "logit_scale": (1.0,),
        "mlp_bias": (None, False),
        "qkv_bias": (None, False),
    },
    "granite": {
        "attention_sinks": (None, False),
        "bias": (None, False),
        "layer_rope_theta": (None,),
        "layer_types": (None,),
        "logit_scale": (1.0,),
        "sliding_window": (None,),
    },
    "cohere": {**_COHERE, "layer_types": (None,), "sliding_window": (None,)},
    "cohere2": {**_COHERE, "use_qk_norm": (None, False)},
    "falcon": {"activation": ("gelu",)},
    "mixtral": {"hidden_act": ("silu",)},
    "qwen3_moe": {"shared_expert_intermediate_size": (0,)},
    "gpt_oss": {
        "attention_bias": (True,),
        "hidden_act": ("silu",),
        "rms_norm_eps": (1e-5,),
        "tie_word_embeddings": (False,),
    },
}
"""Of families whose windows and rotary embeddings this module does not look at. OLMo 2 and 3,
SmolLM3 and GPT-NeoX are not among them: vLLM runs transformers' own code for these."""

_OTHER_NAMES = {"LLaMAForCausalLM": "LlamaForCausalLM"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ABSENT = object()


def check_settings(config: Any, model: str, *, longest: int) -> None:
    """Refuse a configuration that transformers and vLLM would compute differently.

    model: what to call it in an error, such as "student.path='gpt2'".  longest: tokens of the
    longest sequence of the run; a window of more tokens changes nothing.
    Raises: ModelError, naming every such setting.
    """
    problems = [
        *_find_values(config),
        *_find_rope(config),
        *_find_window(config, longest),
        *_find_class(config),
    ]
    if problems:
        raise ModelError(
            f"{model}: settings of its config.json that transformers and vLLM read differently, so "
            f"that the run would learn from another model than the one that writes: "
            f"{'; '.join(problems)}. Choose another model"
        )


def _find_values(config: Any) -> Iterator[str]:
    own = FAMILIES.get(config.model_type) or OTHER_FAMILIES.get(config.model_type, {})
    for key, allowed in {**EVERYWHERE, **own}.items():
        value = getattr(config, key, _ABSENT)
        if value is not _ABSENT and value not in allowed:
            names = " or ".join("null" if each is None else repr(each) for each in allowed)
            yield f"{key}: expected {names}, got {value!r}"
    if config.model_type == "qwen2":  # vLLM computes it and passes the setting over
        expected = config.hidden_size // config.num_attention_heads
        actual = getattr(config, "head_dim", None) or expected
        if actual != expected:
            yield f"head_dim: expected hidden_size / num_attention_heads = {expected}, got {actual}"


def _find_rope(config: Any) -> Iterator[str]:
    rope = getattr(config, "rope_parameters", None)
    if not rope or config.model_type not in FAMILIES:
        return
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_SETTINGS or rope.get("type", kind) != kind:
        known = ", ".join(ROPE_SETTINGS)
        yield f"rope_parameters.rope_type: expected one of {known}, got {rope.get('type', kind)!r}"
        return
    for key in ROPE_SETTINGS_OF_ONE:
        if rope.get(key) not in (None, False):
            yield f"rope_parameters.{key}: expected none, got {rope[key]!r}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        part = rope["partial_rotary_factor"]
        yield f"rope_parameters.partial_rotary_factor: expected 1.0, got {part!r}"
    nulls = [key for key in ROPE_SETTINGS[kind] if key in rope and rope[key] is None]
    for key in nulls:
        yield f"rope_parameters.{key}: expected a number or no such key, got null"
    if kind == "yarn" and not nulls:
        reach = rope.get("original_max_position_embeddings", 0) * rope.get("factor", 0)
        if reach < config.max_position_embeddings:
            yield (
                "rope_parameters: expected original_max_position_embeddings x factor of at least "
                f"max_position_embeddings={config.max_position_embeddings}, got {reach:g}"
            )


def _find_window(config: Any, longest: int) -> Iterator[str]:
    """Windows of attention: of all layers in Mistral and Qwen, of none in the others."""
    family, window = config.model_type, getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if family not in FAMILIES or window is None:
        return
    if window < 1:
        yield f"sliding_window: expected null or a number of at least 1, got {window}"
    elif kinds == {_FULL, _SLIDING} and family in ("qwen2", "qwen3"):
        yield (
            "layer_types: expected one kind for all layers, got "
            f"{_FULL} and {_SLIDING} (use_sliding_window with max_window_layers="
            f"{getattr(config, 'max_window_layers', None)}), which vLLM does not compute"
        )
    elif window < longest and not _slides_everywhere(family, kinds):
        yield (
            f"sliding_window: expected null or at least the run's {longest} tokens (data."
            f"max_prompt_tokens + rollout.sampling.max_response_tokens), got {window}"
        )


def _slides_everywhere(family: str, kinds: set[str]) -> bool:
    if family == "mistral":
        return kinds <= {_SLIDING}
    return family in ("qwen2", "qwen3") and kinds == {_SLIDING}


def _find_class(config: Any) -> Iterator[str]:
    """vLLM chooses the model by `architectures`, transformers by `model_type`."""
    names = getattr(config, "architectures", None)
    own = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if names and own and _OTHER_NAMES.get(names[0], names[0]) != own:
        yield f"architectures: expected {own}, got {names[0]}"
