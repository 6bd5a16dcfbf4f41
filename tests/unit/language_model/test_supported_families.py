"""Every family of the table is read as the objectives assume, packed or padded; others too."""

from __future__ import annotations

import pytest
import torch
from tiny_families import (
    LISTED,
    TEACHERS_ALONE,
    TRAINABLE,
    make_configuration,
    save_family,
)
from transformers import AutoConfig, AutoModelForCausalLM

from distill_system.errors import ConfigError, ModelError
from distill_system.language_model import (
    PACKED_ATTENTION,
    check_longest,
    check_settings,
    check_weight_files,
    choose_linear_modules,
    find_family,
    load_embedding,
    load_language_model,
    logit_cap,
    read_configuration,
    require_trainable,
    unembedding,
)
from distill_system.language_model.families import FAMILIES
from distill_system.language_model.packed_attention import PackedLayout, read_line

PADDED = ("gemma2", "falcon", "falcon_40b", "gpt_oss", "stablelm")
RAGGED = [1, 2, 9, 9, 17]


def _load(folder):
    return load_language_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))


def _read(model, line_1T):
    """Logits of a ragged line by our reader, [T, V]."""
    hidden_TH = read_line(model, line_1T, PackedLayout.build(RAGGED, torch.device("cpu")))
    logits_TV, cap = hidden_TH @ unembedding(model).T, logit_cap(model.config)
    return logits_TV if cap is None else cap * torch.tanh(logits_TV / cap)


def _gradients(model, logits_TV):
    """Of a fixed random linear function of the log-probabilities, by parameter."""
    weights_TV = torch.randn(logits_TV.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logits_TV.log_softmax(-1) * weights_TV).sum().backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_every_family_of_the_table_has_a_tiny_model():
    tried = {make_configuration(variant, num_rows=64).model_type for variant in LISTED}
    decoders = {name for name, family in FAMILIES.items() if not family.is_encoder_decoder}
    assert tried == decoders, "the others are in test_encoder_decoder.py"


@pytest.mark.parametrize("variant", [*LISTED, "stablelm"])
def test_a_line_of_sequences_is_read_as_transformers_reads_each_alone(variant, tmp_path):
    folder = save_family(tmp_path, variant, num_rows=70)
    model = _load(folder)
    packs = model.config._attn_implementation == PACKED_ATTENTION
    assert packs is (variant not in PADDED)
    truth = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    line_1T = torch.randint(64, (1, sum(RAGGED)), generator=torch.Generator().manual_seed(0))
    ours_TV = _read(model, line_1T)
    alone = [truth(input_ids=ids).logits[0] for ids in line_1T.split(RAGGED, dim=1)]
    torch.testing.assert_close(ours_TV, torch.cat(alone), atol=1e-4, rtol=1e-4)
    ours, theirs = _gradients(model, ours_TV), _gradients(truth, torch.cat(alone))
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=2e-5 * largest, rtol=1e-3, msg=name
        )
    into, out = truth.get_input_embeddings().weight, truth.get_output_embeddings().weight
    assert torch.equal(load_embedding(str(folder), which="input"), into.detach())
    assert torch.equal(load_embedding(str(folder), which="output"), out.detach())


@pytest.mark.parametrize("variant", [*LISTED, "stablelm"])
def test_a_folder_as_it_is_saved_passes_the_checks_before_the_workers(variant, tmp_path):
    folder = save_family(tmp_path, variant, num_rows=70)
    config = read_configuration(str(folder))
    check_weight_files(folder, config)
    check_settings(config, "student", longest=64)
    check_longest(config, 64, "student")


@pytest.mark.parametrize("variant", ["llama", "mistral", "gpt2", "opt_350m", "granite"])
def test_padded_rectangles_are_read_as_packed_lines_are(variant, tmp_path):
    folder = save_family(tmp_path, variant)
    packed = _load(folder)
    padded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    line_1T = torch.randint(64, (1, sum(RAGGED)), generator=torch.Generator().manual_seed(0))
    ours_TV, theirs_TV = _read(packed, line_1T), _read(padded, line_1T)
    torch.testing.assert_close(ours_TV, theirs_TV, atol=2e-5, rtol=1e-5)
    ours, theirs = _gradients(packed, ours_TV), _gradients(padded, theirs_TV)
    assert ours.keys() == theirs.keys()
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5 * largest, rtol=1e-3)


@pytest.mark.parametrize("variant", TRAINABLE)
def test_a_familys_linear_modules_are_the_matrices_of_its_blocks(variant):
    """Names of layers that adapters go to: all matrices but embeddings, none left out."""
    configuration = make_configuration(variant, num_rows=64)
    family = FAMILIES[configuration.model_type]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration)
    block = next(m for m in model.modules() if type(m).__name__ in model._no_split_modules)
    named = {n: p for n, p in block.named_parameters() if p.ndim == 2 and "_norm." not in n}
    matrices = {name.split(".")[-2]: parameter for name, parameter in named.items()}
    assert matrices.keys() == set(family.linear_modules)
    names = ("up_proj", "gate_up_proj", "c_fc", "fc1", "dense_h_to_4h")
    widest = next(matrices[name] for name in names if name in matrices)
    into, out = widest.shape if family.keeps_transposed else reversed(widest.shape)
    assert into == 64 < out


@pytest.mark.parametrize("variant", TEACHERS_ALONE)
def test_a_mixture_of_experts_may_teach_and_not_learn(variant):
    configuration = make_configuration(variant, num_rows=64)
    with pytest.raises(ModelError, match=r"student\.path='x': .*can teach and not be trained"):
        require_trainable(configuration, "student.path='x'")


def test_a_familys_own_settings_that_vllm_computes_otherwise_are_refused():
    slopes = make_configuration("falcon", num_rows=64)
    slopes.alibi = True
    with pytest.raises(ModelError, match=r"student: expected alibi=False"):
        find_family(slopes, "student")


def test_lengths_from_which_on_vllm_computes_otherwise_are_refused():
    command = make_configuration("cohere2", num_rows=64)
    check_longest(command, 64, "teacher")
    with pytest.raises(ModelError, match=r"teacher: .* sliding_window=64 .* = 65: .*token wider"):
        check_longest(command, 65, "teacher")
    phi = make_configuration("phi3", num_rows=64)
    check_longest(phi, 100, "teacher")
    half = 3072 // 32 // 2  # of the head size that a configuration has by default
    factors = {"short_factor": [1.0] * half, "long_factor": [2.0] * half}
    long = type(phi)(
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            **factors,
            "original_max_position_embeddings": 32,
        },
    )
    check_longest(long, 32, "teacher")
    with pytest.raises(ModelError, match=r"original_max_position_embeddings=32 .* = 33"):
        check_longest(long, 33, "teacher")


def test_an_unlisted_family_is_told_apart_and_names_its_layers_itself():
    family = find_family(make_configuration("stablelm", num_rows=64), "student")
    assert not family.is_listed
    assert choose_linear_modules(family, ["q_proj"]) == ("q_proj",)
    with pytest.raises(ConfigError, match=r"target_modules: expected the names"):
        choose_linear_modules(family, None)
    assert all(each.is_listed for each in FAMILIES.values())


def test_a_bias_of_the_unembedding_is_refused(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = PhiForCausalLM(PhiConfig(vocab_size=64, intermediate_size=96, **shape))
    with torch.no_grad():
        model.lm_head.bias.normal_()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "phi"
    with pytest.raises(ModelError, match=r"PhiForCausalLM.*a bias of the unembedding of no family"):
        _load(tmp_path)
