"""LoRA students: what learns, what is frozen, and the plain model that comes out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fakes.forked_workers import ForkedWorkers
from fakes.local_workers import LocalWorkers
from peft import PeftModel
from safetensors import safe_open
from tiny_families import save_family
from trajectories import make_trajectories
from transformers import AutoModelForCausalLM

from distill_system.config.model import LearnerConfig, LoraUpdate, OptimizerConfig
from distill_system.errors import ConfigError
from distill_system.language_model import build_empty_model, load_language_model, unembedding
from distill_system.learner import LearnerGroup, ModelSource
from distill_system.learner.adapters import (
    add_adapters,
    checkpoint_name,
    initialise_adapters,
    merged_tensors,
)
from distill_system.learner.sharding import allocate
from distill_system.records import Author

LORA = LoraUpdate(type="lora", rank=4, alpha=8.0)
FAMILIES = ("llama", "gpt2", "opt_350m", "gemma")
IDS = torch.arange(4, 20)[None]


@pytest.fixture
def load(tmp_path):
    """A tiny model of a family, with adapters or without, in this test's folder."""

    def make(family, update=None, *, seed=0):
        folder = tmp_path / family
        if not folder.exists():
            save_family(folder, family)
        model = load_language_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
        if update is not None:
            add_adapters(model, update, seed=seed)
        return model

    return make


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def _move(model):
    """As training would: both factors of every adapter are somewhere else."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_leave_every_logit_as_it_was(load, family):
    adapted = load(family, LORA)
    assert not any(module.training for module in adapted.modules())
    assert torch.equal(_logits(adapted), _logits(load(family)))
    _move(adapted)
    assert (_logits(adapted) - _logits(load(family))).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_tensors_are_a_plain_model_that_computes_the_same(load, family):
    adapted, plain = load(family, LORA), load(family)
    _move(adapted)
    merged = dict(merged_tensors(adapted))
    own = dict(plain.named_parameters())
    assert list(merged) == list(own), "the names of the checkpoint, in its order"
    for name, tensor in merged.items():
        assert (tensor.shape, tensor.dtype) == (own[name].shape, own[name].dtype), name
    plain.load_state_dict(merged, strict=False)
    torch.testing.assert_close(_logits(plain), _logits(adapted), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_factors_learn_and_every_linear_layer_of_a_block_has_them(load, family):
    adapted = load(family, LORA)
    learning = _adapters(adapted)
    assert all(".lora_A." in name or ".lora_B." in name for name in learning)
    assert all(checkpoint_name(name) is None for name in learning)
    matrices = sum(
        p.ndim == 2 and "layers.0." in name.replace(".h.0.", ".layers.0.")
        for name, p in load(family).named_parameters()
    )
    assert len(learning) == 2 * 2 * matrices, "two factors, two blocks"
    assert not unembedding(adapted).requires_grad
    assert not adapted.get_input_embeddings().weight.requires_grad


def test_a_model_without_adapters_gives_its_own_parameters(load):
    plain = load("qwen2")
    for (name, tensor), (own, parameter) in zip(
        merged_tensors(plain), plain.named_parameters(), strict=True
    ):
        assert name == own
        assert tensor.data_ptr() == parameter.data_ptr()


def test_first_weights_follow_from_the_seed_and_the_layer_alone(load):
    state = torch.get_rng_state()
    one, same = _adapters(load("llama", LORA, seed=3)), _adapters(load("llama", LORA, seed=3))
    other = _adapters(load("llama", LORA, seed=4))
    few = LORA.model_copy(update={"target_modules": ("down_proj",)})
    alone = _adapters(load("llama", few, seed=3))
    assert 0 < len(alone) < len(one)
    for name, factor in one.items():
        assert torch.equal(factor, same[name])
        assert (".lora_B." in name) == (not factor.any())
        assert (".lora_B." in name) == torch.equal(factor, other[name])
        if ".lora_A." in name:
            assert factor.abs().max() <= factor.shape[1] ** -0.5
    assert all(torch.equal(factor, one[name]) for name, factor in alone.items())
    assert torch.equal(torch.get_rng_state(), state), "others' random numbers are their own"


def test_an_empty_model_gets_the_same_adapters_once_it_has_memory(load, tmp_path):
    expected = _adapters(load("gpt2", LORA, seed=3))
    empty = build_empty_model(str(tmp_path / "gpt2"))
    add_adapters(empty, LORA, seed=3)
    assert all(parameter.is_meta for parameter in empty.parameters())
    allocate(empty, torch.device("cpu"))
    initialise_adapters(empty, seed=3)
    filled = _adapters(empty)
    assert filled.keys() == expected.keys()
    assert all(torch.equal(factor, expected[name]) for name, factor in filled.items())


@pytest.mark.parametrize("wanted", [("lm_head",), ()])
def test_a_layer_that_is_no_linear_layer_of_a_block_is_refused(load, wanted):
    with pytest.raises(ConfigError, match=r"distill\.update\.target_modules: .* q_proj"):
        load("llama", LORA.model_copy(update={"target_modules": wanted}))


def _learner(make_learner, folder, update, **changes):
    source = ModelSource(path=str(folder), update=update)
    return make_learner(objective=None, source=source, **changes)


def _learn(workers, steps=3):
    group = LearnerGroup(workers)
    rows = make_trajectories(8, Author.DATASET)
    return [group.finish_supervised(group.start_supervised(s, rows)) for s in range(steps)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_bring_the_loss_down_and_move_adapters_alone(make_learner, tmp_path, optimizer):
    folder = save_family(tmp_path / "student", "llama")
    config = OptimizerConfig(type=optimizer, learning_rate=1e-2, warmup_steps=0)
    learner = _learner(make_learner, folder, LORA, optimizer=config)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    losses = [result.metrics["learner/loss"] for result in _learn(LocalWorkers([learner]), steps=8)]
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
        assert parameter.requires_grad or parameter.grad is None


def test_the_exported_model_and_the_exported_adapter_are_the_student(make_learner, tmp_path):
    folder = save_family(tmp_path / "student", "gpt2", num_rows=70, end_ids=[2, 7])
    update = LORA.model_copy(update={"save_adapter": True})
    learner = _learner(make_learner, folder, update)
    _learn(LocalWorkers([learner]))
    learner.export(str(tmp_path / "export"))
    ours = _logits(learner.model)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(_logits(exported), ours, atol=2e-5, rtol=1e-5)
    assert exported.generation_config.eos_token_id == [2, 7]
    assert exported.config.vocab_size == 70, "padded rows stay"
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert (_logits(base) - ours).abs().max() > 1e-2
    peft_model = PeftModel.from_pretrained(base, tmp_path / "export/adapter")
    torch.testing.assert_close(_logits(peft_model), ours, atol=2e-5, rtol=1e-5)
    with safe_open(tmp_path / "export/adapter/adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}, "some readers refuse a file that does not say"
    plain = learner.source.update.model_copy(update={"save_adapter": False})
    _learner(make_learner, folder, plain).export(str(tmp_path / "merged"))
    assert not (tmp_path / "merged/adapter").exists()
    assert (tmp_path / "merged/model.safetensors").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounding_folds_the_adapters_in_and_exports_them_as_they_were(
    make_learner, tmp_path, family
):
    folder = save_family(tmp_path / "student", family)
    update = LORA.model_copy(update={"save_adapter": True})
    learner = _learner(make_learner, folder, update)
    _learn(LocalWorkers([learner]))
    ours = _logits(learner.model)
    expected = {name: tensor.bfloat16() for name, tensor in merged_tensors(learner.model)}
    learner.round_weights("bfloat16")
    learner.export(str(tmp_path / "export"), "bfloat16")
    published = dict(merged_tensors(learner.model))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert torch.equal(parameter.float(), published[name]), "what is measured is the export"
    assert torch.allclose(_logits(learner.model), ours, atol=0.2)
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = PeftModel.from_pretrained(base, tmp_path / "export/adapter")
    torch.testing.assert_close(_logits(adapted), ours, atol=2e-5, rtol=1e-5)


def test_two_ranks_that_share_a_lora_student_learn_what_one_does(make_learner, tmp_path):
    """The adapters of a sharded model, their first weights, updates and merged export."""
    folder = save_family(tmp_path / "student", "llama", num_rows=70)
    alone = _learner(make_learner, folder, LORA)
    _learn(LocalWorkers([alone]))
    expected = dict(merged_tensors(alone.model))
    shared = {"world_size": 2, "config": LearnerConfig(shard_ranks=2)}
    workers = ForkedWorkers(
        [partial(_learner, make_learner, folder, LORA, rank=r, **shared) for r in range(2)]
    )
    try:
        group = LearnerGroup(workers)
        group.connect()
        _learn(workers)
        group.export(tmp_path / "export")
    finally:
        workers.stop()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    base = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    moved = 0.0
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-5, rtol=1e-4)
        moved += float((parameter - base[name]).detach().norm())
    assert moved > 0.1
