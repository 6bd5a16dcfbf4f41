"""Every family of the table is read as the objectives assume; any other is refused."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_families import make_configuration, save_family
from transformers import AutoModelForCausalLM

from distill_system.errors import ModelError
from distill_system.language_model import load_embedding, load_language_model, unembedding
from distill_system.language_model.families import FAMILIES

VARIANTS = ("gemma", "gpt2", "llama", "mistral", "opt", "opt_350m", "qwen2", "qwen3")


def _load(folder):
    return load_language_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))


def test_every_family_of_the_table_has_a_tiny_model():
    tried = {make_configuration(variant, num_rows=64).model_type for variant in VARIANTS}
    decoders = {name for name, family in FAMILIES.items() if not family.is_encoder_decoder}
    assert tried == decoders, "the others are in test_encoder_decoder.py"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_familys_final_hidden_state_times_unembedding_is_its_logits(variant, tmp_path):
    folder = save_family(tmp_path, variant, num_rows=70)
    model, ids = _load(folder), torch.arange(4, 20)[None]
    truth = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden_1LH = model.base_model(input_ids=ids).last_hidden_state
        logits_1LV = hidden_1LH @ unembedding(model, 64).T
        torch.testing.assert_close(logits_1LV, truth(input_ids=ids).logits[..., :64])
    into, out = truth.get_input_embeddings().weight, truth.get_output_embeddings().weight
    assert torch.equal(load_embedding(str(folder), which="input"), into.detach())
    assert torch.equal(load_embedding(str(folder), which="output"), out.detach())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_familys_linear_modules_are_the_matrices_of_its_blocks(variant):
    """Names of layers that adapters go to: all matrices but embeddings, none left out."""
    configuration = make_configuration(variant, num_rows=64)
    family = FAMILIES[configuration.model_type]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration)
    block = next(m for m in model.modules() if type(m).__name__ in model._no_split_modules)
    matrices = {n.split(".")[-2]: p for n, p in block.named_parameters() if p.ndim == 2}
    assert matrices.keys() == set(family.linear_modules)
    widest = next(matrices[name] for name in ("up_proj", "c_fc", "fc1") if name in matrices)
    into, out = widest.shape if family.keeps_transposed else reversed(widest.shape)
    assert into == 64 < out


def test_another_family_is_refused_before_its_weights_are_read(tmp_path):
    folder = save_family(tmp_path, "gemma")
    path = folder / "config.json"
    shape = json.loads(path.read_text())
    path.write_text(json.dumps({**shape, "model_type": "gemma2"}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"gemma, gpt2, .* got model_type='gemma2'.* Choose"):
        _load(folder)
