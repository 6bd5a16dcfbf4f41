"""Folders of tiny random models, one of each supported family, with a word-level tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    T5Config,
)

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, so that no two tokens are nearly as likely
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "initializer_factor": 1.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "init_std": 0.2,
    "scale_embedding": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_GATED = {**_SHAPE, "intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 32}


_NARROW = {key: size for key, size in _GATED.items() if key != "head_dim"}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
_GEMMA = {**_GATED, **_MIXED, "query_pre_attn_scalar": 48}
_EXPERTS = {**_GATED, "num_experts_per_tok": 2, "tie_word_embeddings": False}
_CONFIGURATIONS: dict[str, Callable[..., Any]] = {
    "llama": partial(LlamaConfig, **_GATED, tie_word_embeddings=False),
    "mistral": partial(MistralConfig, **_GATED, tie_word_embeddings=False, sliding_window=6),
    "qwen2": partial(Qwen2Config, **_GATED, tie_word_embeddings=True),
    "qwen2_windowed": partial(
        Qwen2Config, **_GATED, use_sliding_window=True, sliding_window=6, max_window_layers=0
    ),
    "qwen3": partial(Qwen3Config, **_GATED, tie_word_embeddings=False),
    "qwen3_windowed": partial(
        Qwen3Config, **_GATED, use_sliding_window=True, sliding_window=6, max_window_layers=0
    ),
    "gemma": partial(GemmaConfig, **_GATED),
    # caps that low bend nearly every score and logit
    "gemma2": partial(
        Gemma2Config, **_GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=4.0
    ),
    # its logits grow with the width: with larger weights no answer would end
    "gemma3_text": partial(Gemma3TextConfig, **{**_GEMMA, "initializer_range": 0.1}),
    # three quarters of each head turn, as in Phi-4-mini
    "phi3": partial(
        Phi3Config,
        **_NARROW,
        sliding_window=6,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
        },
    ),
    "granite": partial(
        GraniteConfig,
        **_NARROW,
        embedding_multiplier=3.0,
        logits_scaling=1.7,
        residual_multiplier=0.6,
        attention_multiplier=0.3,
    ),
    "cohere": partial(CohereConfig, **_NARROW, logit_scale=0.37, use_qk_norm=True),
    "cohere2": partial(
        Cohere2Config, **{**_NARROW, **_MIXED, "sliding_window": 64}, logit_scale=2.0
    ),
    "olmo2": partial(Olmo2Config, **_NARROW),
    "olmo3": partial(Olmo3Config, **_NARROW, **_MIXED),
    "smollm3": partial(SmolLM3Config, **_NARROW, no_rope_layers=[1, 0]),
    "gpt_neox": partial(GPTNeoXConfig, **_SHAPE, intermediate_size=96),
    "falcon": partial(FalconConfig, **_SHAPE),
    # the form of Falcon-40B: two norms, several key heads
    "falcon_40b": partial(
        FalconConfig, **_SHAPE, new_decoder_architecture=True, num_kv_heads=1, bias=True
    ),
    "gpt2": partial(GPT2Config, **_SHAPE),
    "opt": partial(OPTConfig, **_SHAPE, ffn_dim=96, word_embed_proj_dim=64),
    # the one size of OPT whose norms follow its blocks and whose embeddings are narrower
    "opt_350m": partial(
        OPTConfig, **_SHAPE, ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
    "mixtral": partial(MixtralConfig, **_EXPERTS, num_local_experts=4),
    "qwen3_moe": partial(
        Qwen3MoeConfig, **_EXPERTS, num_experts=4, moe_intermediate_size=48, norm_topk_prob=True
    ),
    "gpt_oss": partial(GptOssConfig, **_EXPERTS, **_MIXED, num_local_experts=4),
    "stablelm": partial(StableLmConfig, **_NARROW),
    # T5 as it was first, scaled before its unembedding; as 1.1 and Flan: gated, with a matrix of
    # its own for the unembedding
    "t5": partial(T5Config, **_T5),
    "t5_gated": partial(T5Config, **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": partial(BartConfig, **_BART),
}
ENCODER_DECODERS = ("t5", "t5_gated", "bart")
LISTED = tuple(n for n in _CONFIGURATIONS if n not in ("stablelm", *ENCODER_DECODERS))
"""Variants of the decoders in the table; stablelm stands for all others."""
TEACHERS_ALONE = ("mixtral", "qwen3_moe", "gpt_oss")
TRAINABLE = tuple(name for name in LISTED if name not in TEACHERS_ALONE)


def make_configuration(family: str, *, num_rows: int) -> Any:
    """One model of a family; the variants that differ most from the others where there are some."""
    return _CONFIGURATIONS[family](vocab_size=num_rows)


def save_family(
    folder: Path,
    family: str,
    *,
    num_tokens: int = 64,
    num_rows: int = 64,
    end_ids: int | list[int] = 2,
    seed: int = 0,
) -> Path:
    """Write a model of num_rows rows with a tokenizer of num_tokens words, and return the folder.

    end_ids: eos_token_id of its generation config. Biases and norms are random, too, and the rows
    behind the tokens are the most likely ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        configuration = make_configuration(family, num_rows=num_rows)
        kind = AutoModelForSeq2SeqLM if configuration.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_config(configuration)
        if family == "t5_gated":
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.get_output_embeddings().weight[num_tokens:] *= 3.0
    model.generation_config.eos_token_id = end_ids
    model.save_pretrained(folder)
    if family == "t5_gated":
        _write_as_published(folder / "config.json")
    save_tokenizer(folder, num_tokens)
    return folder


def _write_as_published(path: Path) -> None:
    """Before transformers 5, which writes true and scale_decoder_outputs=false instead."""
    form = json.loads(path.read_text())
    del form["scale_decoder_outputs"]
    path.write_text(json.dumps({**form, "tie_word_embeddings": False}))


def save_tokenizer(folder: Path, vocab_size: int, *, ends_texts: bool = False) -> None:
    """Words w4 w5 ... separated by blanks, after the four special tokens.

    ends_texts: an end of sequence is put behind a text, as T5's tokenizer does.
    """
    words = [*SPECIAL_TOKENS, *(f"w{index}" for index in range(len(SPECIAL_TOKENS), vocab_size))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends_texts:
        tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", None, [("<eos>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    ).save_pretrained(folder)
