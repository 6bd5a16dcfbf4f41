from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from distill_system.config.model import ArchitectureConfig
from distill_system.errors import ModelError
from distill_system.language_model import (
    build_language_model,
    check_linear_read,
    load_embedding,
    load_language_model,
    unembedding,
)

CPU = torch.device("cpu")


def _load(folder):
    return load_language_model(str(folder), dtype=torch.float32, device=CPU)


def test_hidden_rows_times_unembedding_are_the_models_own_logits(tiny_model_folder):
    for tied in (True, False):
        model = _load(tiny_model_folder(tie_word_embeddings=tied))
        ids = torch.arange(5, 15)[None]
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state
            ours = hidden @ unembedding(model).T
            torch.testing.assert_close(ours, model(input_ids=ids).logits)


def test_a_model_that_scales_its_logits_is_refused(tiny_model_folder):
    model = _load(tiny_model_folder())
    head = model.lm_head
    head.forward = lambda hidden: 3.0 * torch.nn.functional.linear(hidden, head.weight)
    with pytest.raises(ModelError, match="logits = final hidden state x unembedding"):
        check_linear_read(model, "scaled")


def test_a_model_with_damaged_weights_is_refused(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder())
    with torch.no_grad():
        model.base_model.norm.weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"'damaged' .*expected finite logits, got NaN"):
        check_linear_read(model, "damaged")


def test_gemma_reads_linearly_too():
    config = GemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    check_linear_read(GemmaForCausalLM(config).eval(), "gemma")


def test_action_embeddings_are_the_models_input_embeddings(tiny_model_folder):
    for tied in (True, False):
        folder = tiny_model_folder(tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_pretrained(folder)
        stored = load_embedding(str(folder), which="input")
        assert torch.equal(stored, model.get_input_embeddings().weight.float())


def test_a_missing_model_is_one_clear_error(tmp_path):
    with pytest.raises(ModelError, match="cannot be read as a model"):
        _load(tmp_path / "nothing")


def test_random_weights_repeat_with_the_seed():
    shape = ArchitectureConfig(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2)

    def build(seed):
        model = build_language_model(
            shape, vocab_size=50, pad_token_id=0, bos_token_id=None, eos_token_id=1, seed=seed
        )
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))
