from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from distill_system.data.fingerprints import (
    fingerprint_model,
    fingerprint_prompt,
    fingerprint_tokenizer,
)
from distill_system.errors import ModelError


@pytest.fixture
def model(tmp_path, tiny_model_folder):
    return shutil.copytree(tiny_model_folder(), tmp_path / "model")


def retrain(folder, name="model.safetensors"):
    """Other weights of the same names and shapes: nothing but the bytes of tensors changes."""
    weights = load_file(folder / name)
    trained = {k: v + torch.randn_like(v) * 1e-3 for k, v in weights.items()}
    save_file(trained, folder / name, metadata={"format": "pt"})


def test_a_moved_model_is_the_same_and_a_retrained_one_is_not(model, tmp_path):
    before = fingerprint_model(str(model))
    moved = shutil.copytree(model, tmp_path / "moved")
    assert fingerprint_model(str(moved)) == before
    size = (moved / "model.safetensors").stat().st_size
    retrain(moved)
    assert (moved / "model.safetensors").stat().st_size == size
    assert fingerprint_model(str(moved)) != before


def test_another_configuration_of_the_same_weights_is_another_model(model):
    before = fingerprint_model(str(model))
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    assert fingerprint_model(str(model)) != before


def test_a_folder_without_weights_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"config\.json and \*\.safetensors, found \['config"):
        fingerprint_model(str(tmp_path))


def test_a_tokenizer_is_known_by_its_tokens_and_end(model):
    ours = AutoTokenizer.from_pretrained(model)
    again = AutoTokenizer.from_pretrained(model)
    assert fingerprint_tokenizer(ours) == fingerprint_tokenizer(again)
    again.eos_token = "w9"
    other = AutoTokenizer.from_pretrained(model)
    other.add_tokens(["one more"])
    names = {fingerprint_tokenizer(each) for each in (ours, again, other)}
    assert len(names) == 3


def test_a_prompt_is_known_by_its_tokens():
    ids = np.array([1, 2, 3], np.int32)
    assert fingerprint_prompt(ids) == fingerprint_prompt(ids.copy())
    assert fingerprint_prompt(ids) != fingerprint_prompt(ids[:2])
    assert fingerprint_prompt(np.array([513], np.int32)) != fingerprint_prompt(
        np.array([1, 2], np.int32)
    )
