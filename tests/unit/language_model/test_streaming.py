"""Models filled from their files equal those that transformers loads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import TRAINABLE, save_family
from transformers import AutoModelForCausalLM

from distill_system.errors import ModelError
from distill_system.language_model import build_empty_model, read_weights
from distill_system.learner.sharding import allocate


def _fill(path):
    model = build_empty_model(str(path))
    assert all(parameter.is_meta for parameter in model.parameters())
    allocate(model, torch.device("cpu"))
    read_weights(model, str(path), everyone=False)
    return model


def _rewrite(path, change):
    """The folder's tensors, changed."""
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", [*TRAINABLE, "stablelm"])
def test_every_family_is_what_transformers_loads(tmp_path, family):
    save_family(tmp_path, family, end_ids=[2, 3])
    model = _fill(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name
            assert ours[name].dtype == theirs[name].dtype, name
    tied = [
        m.get_output_embeddings().weight is m.get_input_embeddings().weight
        for m in (model, expected)
    ]
    assert tied[0] == tied[1]
    assert model.generation_config.eos_token_id == [2, 3]
    assert not model.training
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_files_without_the_base_models_prefix_are_read(tmp_path):
    save_family(tmp_path, "gpt2")
    expected = _fill(tmp_path)
    _rewrite(tmp_path, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()})
    assert all(map(torch.equal, _fill(tmp_path).parameters(), expected.parameters()))


def test_weights_stored_in_bfloat16_are_read_as_float32(tmp_path):
    save_family(tmp_path, "llama")
    _rewrite(tmp_path, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    stored = load_file(tmp_path / "model.safetensors")
    for name, parameter in _fill(tmp_path).named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, stored[name].float())


def test_what_is_missing_or_of_another_shape_is_named(tmp_path):
    save_family(tmp_path, "llama")

    def spoil(tensors):
        del tensors["model.norm.weight"]
        return {**tensors, "lm_head.weight": torch.zeros(7, 64)}

    _rewrite(tmp_path, spoil)
    model = build_empty_model(str(tmp_path))
    allocate(model, torch.device("cpu"))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing") as raised:
        read_weights(model, str(tmp_path), everyone=False)
    assert "lm_head.weight has [7, 64], expected [64, 64]" in str(raised.value)
    assert "2 in all" in str(raised.value)


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        build_empty_model(str(tmp_path))
