"""Folders of tiny random models, one of each supported family, with a word-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
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


def make_configuration(family: str, *, num_rows: int) -> Any:
    """One model of a family; the variants that differ most from the others where there are some."""
    size = {"vocab_size": num_rows}
    if family == "llama":
        return LlamaConfig(**_GATED, **size, tie_word_embeddings=False)
    if family == "mistral":
        return MistralConfig(**_GATED, **size, tie_word_embeddings=False, sliding_window=6)
    if family == "qwen2":
        return Qwen2Config(**_GATED, **size, tie_word_embeddings=True)
    if family == "qwen3":
        return Qwen3Config(**_GATED, **size, tie_word_embeddings=False)
    if family == "gemma":
        return GemmaConfig(**_GATED, **size)
    if family == "gpt2":
        return GPT2Config(**_SHAPE, **size)
    if family in ("t5", "t5_gated"):
        # T5 as it was first, tied and scaled, and T5 1.1: gated, two matrices.
        gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        return T5Config(**_T5, **size, **(gated if family == "t5_gated" else {}))
    if family == "bart":
        return BartConfig(**_BART, **size)
    if family == "opt":
        return OPTConfig(**_SHAPE, **size, ffn_dim=96, word_embed_proj_dim=64)
    assert family == "opt_350m", family
    # The one size of OPT whose norms follow its blocks and whose embeddings are narrower.
    return OPTConfig(
        **_SHAPE, **size, ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=False
    )


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
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.get_output_embeddings().weight[num_tokens:] *= 3.0
    model.generation_config.eos_token_id = end_ids
    model.save_pretrained(folder)
    save_tokenizer(folder, num_tokens)
    return folder


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
