"""Tiny models of random weights, one of every family that the learner trains."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from distill_system.language_model import PACKED_ATTENTION

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

OPT_SHAPE = {
    **{key: size for key, size in SHAPE.items() if key != "num_key_value_heads"},
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
}

FAMILIES = {
    "llama": (LlamaConfig, SHAPE),
    "llama_tied": (LlamaConfig, {**SHAPE, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, SHAPE),
    "qwen2_half_its_blocks_windowed": (
        Qwen2Config,
        {**SHAPE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {**SHAPE, "head_dim": 16}),
    "gemma": (GemmaConfig, {**SHAPE, "head_dim": 16, "num_key_value_heads": 1}),
    "mistral": (MistralConfig, {**SHAPE, "sliding_window": None}),
    "mistral_windowed": (MistralConfig, {**SHAPE, "sliding_window": 6}),
    "gpt2": (
        GPT2Config,
        {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (OPTConfig, OPT_SHAPE),
    "opt_norm_last_narrow_embeddings": (
        OPTConfig,
        {**OPT_SHAPE, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
}


@pytest.fixture
def families():
    """Names that make_family_model knows."""
    return sorted(FAMILIES)


@pytest.fixture
def make_family_model():
    """Makes a model: make(family, dtype=torch.float64, attention="packed"), always the same."""

    def make(family, *, dtype=torch.float64, attention=PACKED_ATTENTION):
        config_class, shape = FAMILIES[family]
        key = "init_std" if config_class is OPTConfig else "initializer_range"
        config = config_class(**shape, **{key: 0.3})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            # Norms and biases begin at 1 and 0, where mistakes about them would not show.
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model.to(dtype).eval()

    return make
