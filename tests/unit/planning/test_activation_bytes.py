from __future__ import annotations

import pytest
import torch
from tiny_families import make_configuration
from transformers import AutoModelForCausalLM

from distill_system.config.model import LearnerConfig, LoraUpdate
from distill_system.language_model import PACKED_ATTENTION
from distill_system.language_model.packed_attention import PackedLayout, read_line
from distill_system.learner.adapters import add_adapters
from distill_system.learner.sharding import prepare_blocks
from distill_system.planning import ModelShape, measure_shape
from distill_system.planning.activations import (
    Arithmetic,
    Reading,
    activation_bytes_per_token,
)

LENGTHS = [40, 44, 48]  # one rectangle, nearly full
FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gpt2", "opt")
SIZES = {"hidden_size": 192, "num_attention_heads": 4}
GATED = {"intermediate_size": 520, "num_key_value_heads": 2, "head_dim": 40}


def _make(family: str, *, lora: bool = False, dtype=torch.float32, checkpointing: bool = False):
    config = make_configuration(family, num_rows=72)
    sizes = SIZES | (GATED if family not in ("gpt2", "opt") else {})
    for name, value in sizes.items():
        setattr(config, name, value)
    if family == "opt":
        config.ffn_dim, config.word_embed_proj_dim = 520, 192
    if family == "gpt2":
        config.n_inner = 520
    if family == "qwen2":
        config.head_dim = 48  # Qwen2 divides the hidden size
    config._attn_implementation = PACKED_ATTENTION
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION).eval()
    if lora:
        add_adapters(model, LoraUpdate(type="lora", rank=2), seed=0)
    prepare_blocks(model, LearnerConfig(activation_checkpointing=checkpointing))
    return measure_shape(config, name=family), model.to(dtype)


def _kept_bytes_per_token(model, *, autocast: bool = False) -> float:
    """What autograd's saved tensors hold, each storage once, without weights and their copies."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(p.shape)[::-1] for p in model.parameters()
    }
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        is_weight = storage.data_ptr() in weights or tuple(tensor.shape) in sizes
        if not is_weight:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    line = torch.randint(0, 72, (1, sum(LENGTHS)))
    layout = PackedLayout.build(LENGTHS, torch.device("cpu"))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        read_line(model, line, layout)
    return sum(storages.values()) / sum(LENGTHS)


def _predicted(shape: ModelShape, arithmetic: Arithmetic, **how: bool) -> float:
    return activation_bytes_per_token(
        shape, Reading(arithmetic=arithmetic, in_rectangles=True, **how)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arithmetic", list(Arithmetic))
def test_activations_are_what_autograd_saves(family: str, arithmetic: Arithmetic) -> None:
    dtype = torch.bfloat16 if arithmetic is Arithmetic.BFLOAT16 else torch.float32
    shape, model = _make(family, dtype=dtype)
    kept = _kept_bytes_per_token(model, autocast=arithmetic is Arithmetic.AUTOCAST)
    assert _predicted(shape, arithmetic) == pytest.approx(kept, rel=0.15)


def test_frozen_norms_keep_less() -> None:
    shape, model = _make("llama", lora=True)
    kept = _kept_bytes_per_token(model)
    assert _predicted(shape, Arithmetic.FLOAT32, learns_norms=False) == pytest.approx(kept, rel=0.1)


def test_with_checkpointing_a_block_keeps_its_input() -> None:
    shape, model = _make("llama", checkpointing=True)
    kept = _kept_bytes_per_token(model)
    predicted = _predicted(shape, Arithmetic.FLOAT32, checkpointing=True)
    assert predicted == pytest.approx(kept, rel=0.15)
    assert predicted < 0.2 * _predicted(shape, Arithmetic.FLOAT32)
