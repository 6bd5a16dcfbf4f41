"""Settings that transformers and vLLM read differently are refused by name, and no others."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import make_configuration
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from distill_system.errors import ModelError
from distill_system.language_model.settings import (
    ACTIVATIONS,
    EVERYWHERE,
    FAMILIES,
    OTHER_FAMILIES,
    ROPE_SETTINGS,
    ROPE_SETTINGS_OF_ONE,
    check_settings,
)

OF_NUMBERS = {
    "attention_bias",
    "do_layer_norm_before",
    "enable_bias",
    "ffn_dim",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "layer_norm_elementwise_affine",
    "layer_norm_epsilon",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "_remove_final_layer_norm",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
    "word_embed_proj_dim",
}
"""Settings whose values both libraries compute (tests/unit/language_model and the pipeline's tests
of families compare the numbers), or that the check of windows, ropes or weights looks at."""

WITHOUT_EFFECT = {
    "attention_dropout",
    "attn_pdrop",
    "bos_token_id",
    "dropout",
    "embd_pdrop",
    "eos_token_id",
    "init_std",
    "initializer_range",
    "layerdrop",
    "pad_token_id",
    "pretraining_tp",
    "resid_pdrop",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "use_cache",
}
"""Of training, of generation and of heads that no run has."""

VLLM_READS_AND_KNOWS = {
    "ada_rms_norm_t_cond_dim",  # of ada_rms_norm_t_cond
    "num_labels",  # of classifiers
    "target_layer_count",  # of a draft model, whose layer_types are refused
}

VLLM_FILES = {
    "llama": ("llama",),
    "mistral": ("llama", "mistral"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen2", "qwen3"),
    "gemma": ("gemma",),
    "gpt2": ("gpt2",),
    "opt": ("opt",),
}

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="compares with the installed vLLM"
)


def _configure(family: str, **settings: Any) -> Any:
    """A configuration as it comes out of a config.json with these settings."""
    tree = make_configuration(family, num_rows=64).to_dict()
    if "use_sliding_window" in settings:
        del tree["layer_types"]  # the class makes them
    tree |= settings
    return CONFIG_MAPPING[family].from_dict(json.loads(json.dumps(tree)))


def _check(config: Any, longest: int = 16) -> None:
    check_settings(config, "teacher.path='x'", longest=longest)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_plain_model_of_each_family_passes(family: str) -> None:
    config = _configure(family)
    config.sliding_window = None if family == "llama" else getattr(config, "sliding_window", None)
    _check(config)


ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "settings", "told"),
    [
        # one reader passes the setting over
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: expected True, got False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "mish"}, "activation_function: expected .*'gelu_new'"),
        ("opt", {"activation_function": "laplace"}, "activation_function"),
        ("qwen3", {"attention_bias": True}, "attention_bias: expected null or False, got True"),
        ("gemma", {"attention_bias": True}, "attention_bias"),
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"mlp_bias": True}, "mlp_bias"),
        ("mistral", {"llama_4_scaling": {"beta": 0.1}}, "llama_4_scaling"),
        ("mistral", {"ada_rms_norm_t_cond": True}, "ada_rms_norm_t_cond"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ("llama", {"logit_scale": 0.25}, "logit_scale: expected 1.0, got 0.25"),
        ("llama", {"logit_scale": None}, "logit_scale: expected 1.0, got None"),
        ("llama", {"bias": True}, "bias"),
        ("llama", {"qkv_bias": True}, "qkv_bias"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("llama", {"head_dtype": "float16"}, "head_dtype"),
        ("llama", {"block_configs": [{}]}, "block_configs"),
        (
            "qwen2",
            {"dual_chunk_attention_config": {"chunk_size": 8}},
            "dual_chunk_attention_config",
        ),
        ("qwen2", {"qk_norm": True}, "qk_norm"),
        ("qwen2", {"is_causal": False}, "is_causal"),
        ("qwen2", {"head_dim": 64}, "head_dim: expected .* = 32, got 64"),
        # rotary embeddings
        ("llama", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected .*1.0, got 0.5"),
        ("qwen2", {"rotary_pct": 0.25}, "rotary_pct"),
        ("gemma", {"rotary_emb_base": 5e5}, "rotary_emb_base"),
        (
            "llama",
            {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}},
            "rope_type: expected one of default, linear, llama3, yarn, got 'dynamic'",
        ),
        ("qwen3", {"rope_parameters": {**ROPE, "mrope_section": [4, 4, 8]}}, "mrope_section"),
        ("llama", {"rope_parameters": {**ROPE, "use_fope": True}}, "use_fope"),
        ("llama", {"rope_parameters": {**ROPE, "rope_dim": 16}}, "rope_dim"),
        (
            "llama",
            {"rope_parameters": {**YARN, "original_max_position_embeddings": 8}},
            "of at least max_position_embeddings=128, got 32",
        ),
        ("qwen2", {"rope_parameters": {**YARN, "beta_fast": None}}, "beta_fast"),
        # windows
        ("llama", {"sliding_window": 8}, "sliding_window: expected null or at least .* 16 tokens"),
        ("gpt2", {"sliding_window": 8}, "sliding_window"),
        ("mistral", {"sliding_window": 0}, "sliding_window: expected null or .*1, got 0"),
        (
            "mistral",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "sliding_window: expected null",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
            "layer_types: expected one kind for all layers.*max_window_layers=1",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
            "sliding_window: expected null",
        ),
        # another model altogether
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ("qwen2", {"architectures": ["Qwen2Model"]}, "expected Qwen2ForCausalLM, got Qwen2Model"),
        ("llama", {"architectures": ["MistralForCausalLM"]}, "architectures"),
        ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_what_is_read_differently_is_refused_by_its_name(
    family: str, settings: dict, told: str
) -> None:
    with pytest.raises(ModelError, match=rf"teacher\.path='x'.*{told}"):
        _check(_configure(family, **settings))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen2", {"rope_parameters": YARN}),
        ("llama", {"rope_scaling": None, "rope_theta": 5e5}),
        ("llama", {"rope_parameters": {**YARN, "finetuned": True}}),
        ("llama", {"sliding_window": 16}),
        ("llama", {"architectures": ["LLaMAForCausalLM"]}),
        ("llama", {"architectures": None}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}),
        ("gpt2", {"activation_function": "gelu"}),
        ("gemma", {"hidden_act": "gelu"}),
        ("opt", {"do_layer_norm_before": False, "enable_bias": False}),
    ],
)
def test_what_both_compute_passes(family: str, settings: dict) -> None:
    _check(_configure(family, **settings))


@pytest.mark.parametrize("family", sorted(OTHER_FAMILIES))
def test_what_transformers_takes_without_a_word_passes_for_the_other_families(family: str) -> None:
    """Their classes' defaults are settings of real models."""
    _check(CONFIG_MAPPING[family]())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gemma2", {"tie_word_embeddings": False}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("phi3", {"attention_bias": True}),
        ("phi3", {"logit_scale": 0.5}),
        ("phi3", {"qkv_bias": True}),
        ("phi3", {"layer_types": ["sliding_attention"] * 32}),
        ("granite", {"attention_sinks": True}),
        ("granite", {"layer_rope_theta": [1e4]}),
        ("granite", {"logit_scale": 2.0}),
        ("granite", {"sliding_window": 8}),
        ("cohere", {"attention_bias": True}),
        ("cohere", {"hidden_act": "gelu"}),
        ("cohere", {"sliding_window": 8}),
        ("cohere", {"tie_word_embeddings": False}),
        ("cohere2", {"use_qk_norm": True}),
        ("falcon", {"activation": "relu"}),
        ("mixtral", {"hidden_act": "gelu"}),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}),
        ("gpt_oss", {"rms_norm_eps": 1e-6}),
        ("gpt_oss", {"attention_bias": False}),
    ],
)
def test_what_the_other_families_are_read_differently_by_is_refused(
    family: str, settings: dict
) -> None:
    key, value = next(iter(settings.items()))
    with pytest.raises(ModelError, match=rf"{key}: expected .*, got {re.escape(repr(value))}"):
        _check(CONFIG_MAPPING[family](**settings))


def test_every_such_setting_is_told_at_once() -> None:
    with pytest.raises(ModelError, match=r"(?s)hidden_act.*logit_scale.*rope_type.*sliding_window"):
        _check(
            _configure(
                "llama",
                logit_scale=2.0,
                hidden_act="relu",
                sliding_window=4,
                rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0},
            )
        )


def _hub(model_type: str, name: str, **settings: Any) -> dict[str, Any]:
    """What stands in config.json of models that people use, beside their sizes."""
    common = {
        "architectures": [name],
        "model_type": model_type,
        "_name_or_path": "/some/where",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
    }
    return {**common, **settings}


HUB = {
    "SmolLM2": _hub(
        "llama",
        "LlamaForCausalLM",
        attention_bias=False,
        attention_dropout=0.0,
        hidden_act="silu",
        is_llama_config=True,
        max_position_embeddings=8192,
        mlp_bias=False,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        tie_word_embeddings=True,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ),
    "Llama 3.2": _hub(
        "llama",
        "LlamaForCausalLM",
        eos_token_id=[128001, 128008, 128009],
        head_dim=64,
        hidden_act="silu",
        max_position_embeddings=131072,
        pretraining_tp=1,
        rope_scaling={
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        rope_theta=500000.0,
        unsloth_version="2024.9",
        unsloth_fixed=True,
    ),
    "Vicuna": _hub(
        "llama",
        "LlamaForCausalLM",
        hidden_act="silu",
        max_position_embeddings=4096,
        max_sequence_length=4096,
        pad_token_id=-1,
        pretraining_tp=1,
        rope_scaling={"type": "linear", "factor": 2.0},
    ),
    "Mistral 0.1": _hub(
        "mistral", "MistralForCausalLM", hidden_act="silu", sliding_window=4096, rope_theta=10000.0
    ),
    "Mistral 0.3": _hub(
        "mistral", "MistralForCausalLM", hidden_act="silu", sliding_window=None, rope_theta=1e6
    ),
    "Qwen2.5": _hub(
        "qwen2",
        "Qwen2ForCausalLM",
        hidden_act="silu",
        max_position_embeddings=32768,
        max_window_layers=24,
        rope_theta=1e6,
        sliding_window=32768,
        use_mrope=False,
        use_sliding_window=False,
    ),
    "Qwen2.5 with YaRN": _hub(
        "qwen2",
        "Qwen2ForCausalLM",
        hidden_act="silu",
        max_position_embeddings=131072,
        rope_theta=1e6,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "Qwen3": _hub(
        "qwen3",
        "Qwen3ForCausalLM",
        attention_bias=False,
        head_dim=128,
        hidden_act="silu",
        max_window_layers=28,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "Gemma": _hub(
        "gemma",
        "GemmaForCausalLM",
        attention_bias=False,
        hidden_act="gelu",
        hidden_activation=None,
        rope_scaling=None,
        rope_theta=10000.0,
    ),
    "Gemma, corrected": _hub(
        "gemma",
        "GemmaForCausalLM",
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
    ),
    "GPT-2": _hub(
        "gpt2",
        "GPT2LMHeadModel",
        activation_function="gelu_new",
        attn_pdrop=0.1,
        n_ctx=1024,
        n_embd=768,
        n_head=12,
        n_layer=12,
        n_positions=1024,
        summary_activation=None,
        summary_type="cls_index",
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
    ),
    "OPT": _hub(
        "opt",
        "OPTForCausalLM",
        _remove_final_layer_norm=False,
        activation_dropout=0.0,
        activation_function="relu",
        do_layer_norm_before=False,
        ffn_dim=4096,
        prefix="</s>",
        word_embed_proj_dim=512,
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_configurations_of_the_hub_pass(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HUB[name]))
    _check(AutoConfig.from_pretrained(tmp_path), longest=2048)


# ---------------------------------------------------------- the tables against installed libraries


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_setting_of_transformers_class_is_known(family: str) -> None:
    """A setting that a new version of transformers brings fails here until it is read through."""
    common = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(CONFIG_MAPPING[family])} - common
    known = OF_NUMBERS | WITHOUT_EFFECT | {*EVERYWHERE} | {*FAMILIES[family]}
    assert own - known == set()


def _settings_read(path: Path) -> Iterator[str]:
    """Names x of config.x, self.config.x and getattr(config, "x") in a source file."""

    def is_config(node: ast.expr) -> bool:
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
        return name in ("config", "hf_config", "hf_text_config")

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and is_config(node.value):
            yield node.attr
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", "") in ("getattr", "hasattr")
            and is_config(node.args[0])
            and isinstance(node.args[1], ast.Constant)
        ):
            yield str(node.args[1].value)


def _vllm(*parts: str) -> Path:
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent.joinpath(*parts)


@needs_vllm
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_setting_that_vllm_reads_is_known(family: str) -> None:
    files = [_vllm("model_executor", "models", f"{name}.py") for name in VLLM_FILES[family]]
    read = {name for file in files for name in _settings_read(file)}
    assert {"hidden_size", "vocab_size"} <= read, "the scan finds what is there"
    class_ = CONFIG_MAPPING[family]
    own = {field.name for field in fields(class_)} | {*class_.attribute_map}
    known = OF_NUMBERS | VLLM_READS_AND_KNOWS | {*EVERYWHERE} | {*FAMILIES[family]}
    methods = {"get_text_config"}
    assert read - known - own - methods == set()
    # What stands in another family's row alone is a setting of this one too, if vLLM reads it.
    unlisted = read - own - {*EVERYWHERE} - {*FAMILIES[family]} - VLLM_READS_AND_KNOWS - methods
    assert unlisted <= {"layer_types", "sliding_window", "head_dim"}


@needs_vllm
def test_every_setting_of_a_rotary_embedding_that_vllm_reads_is_known() -> None:
    file = _vllm("model_executor", "layers", "rotary_embedding", "__init__.py")
    read = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "rope_parameters":
            read.add(ast.literal_eval(node.slice))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and getattr(node.func.value, "id", "") == "rope_parameters"
        ):
            read.add(ast.literal_eval(node.args[0]))
    assert "rope_theta" in read
    refused_by_kind = {"short_factor", "long_factor"}
    known = {"rope_type", "partial_rotary_factor", *ROPE_SETTINGS_OF_ONE, *refused_by_kind}
    assert read - known - {key for keys in ROPE_SETTINGS.values() for key in keys} == set()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_class_that_is_expected_is_transformers_own(family: str) -> None:
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family].startswith(
        {"gpt2": "GPT2", "opt": "OPT"}.get(family, family.capitalize())
    )


@pytest.fixture(scope="module")
def vllm_layers() -> Iterator[Callable[..., Any]]:
    """Makes layers of vLLM outside of an engine."""
    pytest.importorskip("vllm._custom_ops")
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        from vllm.model_executor.layers.activation import get_act_fn
        from vllm.model_executor.layers.rotary_embedding import get_rope

        def make(kind: str, *arguments: Any, **options: Any) -> Any:
            return {"rope": get_rope, "activation": get_act_fn}[kind](*arguments, **options)

        yield make


@pytest.mark.parametrize(
    "rope",
    [
        ROPE,
        {**ROPE, "rope_theta": 5e5},
        {**ROPE, "rope_type": "linear", "factor": 2.5},
        LLAMA3,
        {**LLAMA3, "factor": 32.0, "high_freq_factor": 8.0},
        YARN,
        {**YARN, "attention_factor": 0.7},
        {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        {**YARN, "truncate": False},
    ],
)
def test_both_turn_heads_by_the_same_angles(vllm_layers, rope: dict) -> None:
    config = _configure("llama", rope_parameters=rope)
    positions = torch.arange(128)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 1), positions[None])
    theirs = vllm_layers(
        "rope",
        config.head_dim,
        max_position=config.max_position_embeddings,
        rope_parameters=config.rope_parameters,
        dtype=torch.float32,
    )
    half = config.head_dim // 2
    cos_sin = theirs.cos_sin_cache[positions].float()
    assert torch.allclose(cos_sin[:, :half], cos[0, :, :half], atol=2e-5)
    assert torch.allclose(cos_sin[:, half:], sin[0, :, :half], atol=2e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_both_compute_the_same_activation(vllm_layers, name: str) -> None:
    x = torch.linspace(-6, 6, 101)
    theirs = vllm_layers("activation", name)
    compute = getattr(theirs, "forward_native", theirs)
    assert torch.allclose(compute(x), ACT2FN[name](x), atol=1e-6)
