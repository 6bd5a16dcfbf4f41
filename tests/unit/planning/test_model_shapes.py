from __future__ import annotations

import pytest
import torch
from tiny_families import LISTED, make_configuration
from transformers import AutoModelForCausalLM, LlamaConfig

from distill_system.config.model import ArchitectureConfig
from distill_system.errors import ModelError
from distill_system.language_model import build_language_model
from distill_system.planning import architecture_shape, measure_shape, read_shape


@pytest.mark.parametrize("family", [*LISTED, "stablelm"])
def test_parameters_are_those_of_the_real_model(family: str) -> None:
    config = make_configuration(family, num_rows=72)
    model = AutoModelForCausalLM.from_config(config)
    shape = measure_shape(config, name=family)
    blocks = model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else None
    blocks = model.transformer.h if blocks is None else blocks
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.num_blocks == len(blocks) == 2
    ids_1L = torch.tensor([[5, 6, 7]])
    hidden_1LH = model.base_model(input_ids=ids_1L).last_hidden_state
    assert hidden_1LH.shape[-1] == shape.row_size
    assert (shape.vocabulary, shape.hidden_size) == (72, 64)


def test_an_architecture_has_the_shape_of_the_model_that_is_built() -> None:
    architecture = ArchitectureConfig(
        hidden_size=64, intermediate_size=168, num_layers=3, num_heads=2
    )
    built = build_language_model(
        architecture, vocab_size=50, pad_token_id=0, bos_token_id=None, eos_token_id=1, seed=0
    )
    shape = architecture_shape(architecture, vocabulary=50)
    assert shape.num_parameters == sum(p.numel() for p in built.parameters())


def test_seventy_billion_parameters_are_counted_without_being_made() -> None:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    assert measure_shape(config, name="70B").num_parameters == 70_553_706_496


def test_a_model_that_is_not_here_says_how_to_fetch_its_configuration() -> None:
    with pytest.raises(ModelError, match=r"teacher.path='nobody/nothing'.*hf download nobody"):
        read_shape("nobody/nothing", key="teacher.path")


def test_a_folder_without_a_configuration_is_named(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"student.path=.*expected a folder with the config.json"):
        read_shape(str(tmp_path), key="student.path")
