"""config.json and generation_config.json are read, or refused by file and key."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_families import save_family

from distill_system.errors import ModelError
from distill_system.language_model import read_configuration, read_generation_configuration

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "opt", "opt_350m")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("model"), "qwen2", end_ids=[2, 3])


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


def _configure(folder: Path, file: str = "config.json", **settings: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_own_files_are_read(tmp_path: Path, family: str) -> None:
    folder = str(save_family(tmp_path, family))
    assert read_configuration(folder).num_hidden_layers == 2
    assert read_generation_configuration(folder).eos_token_id == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("hidden_size", "64"),
        ("hidden_size", 64.5),
        ("hidden_size", True),
        ("hidden_size", None),
        ("hidden_size", 10**30),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", [2]),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("num_attention_heads", 3),
        ("intermediate_size", -1),
        ("vocab_size", 0),
        ("vocab_size", 10**12),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", 10**15),
        ("head_dim", 0),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "small"),
        ("rope_theta", float("inf")),
        ("rope_theta", 0),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [2, "</s>"]),
        ("eos_token_id", 2.5),
        ("eos_token_id", {"id": 2}),
        ("bos_token_id", "<s>"),
        ("pad_token_id", [0]),
        ("model_type", None),
        ("model_type", 7),
    ],
)
def test_a_value_that_no_model_has_is_told_with_file_and_key(folder: Path, key, value) -> None:
    _configure(folder, **{key: value})
    begin = time.perf_counter()
    if key == "num_attention_heads" and value == 3:
        _configure(folder, num_key_value_heads=2)
    with pytest.raises(ModelError, match=rf"model/config\.json: .*{key}: expected"):
        read_configuration(str(folder))
    assert time.perf_counter() - begin < 20, "nothing of that size is made"


@pytest.mark.parametrize(
    ("key", "value"),
    [("tie_word_embeddings", "yes"), ("hidden_act", 3), ("max_window_layers", "all")],
)
def test_what_transformers_refuses_is_told_with_its_words(folder: Path, key, value) -> None:
    _configure(folder, **{key: value})
    with pytest.raises(ModelError, match=rf"model/config\.json cannot be read .*{key}"):
        read_configuration(str(folder))


def test_several_faults_are_told_at_once(folder: Path) -> None:
    _configure(folder, hidden_size=0, vocab_size=-1, eos_token_id="x")
    with pytest.raises(ModelError, match=r"(?s)vocab_size.*hidden_size.*eos_token_id"):
        read_configuration(str(folder))


@pytest.mark.parametrize("value", [-1, None])
def test_no_padding_token_may_be_minus_one_or_null(folder: Path, value) -> None:
    _configure(folder, pad_token_id=value)
    assert read_configuration(str(folder)).pad_token_id in (-1, None)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "expected JSON"),
        (b'{"model_type": "qwen2",', "expected JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b'"qwen2"', "expected a JSON object, got str"),
        (b"\xff\xfe{\x00}\x00", "expected text in UTF-8, got byte 0xff at offset 0"),
        (b'{"name": "\xe4"}', "expected text in UTF-8, got byte 0xe4 at offset 10"),
        (b"[" * 100_000, "expected JSON|recursion"),
        (b"version https://git-lfs.github.com/spec/v1\n", "expected JSON"),
    ],
)
def test_a_broken_file_of_any_form_is_told(
    folder: Path, name: str, content: bytes, told: str
) -> None:
    (folder / name).write_bytes(content)
    read = read_configuration if name == "config.json" else read_generation_configuration
    with pytest.raises(ModelError, match=rf"model/{name}: {told}"):
        read(str(folder))


def test_a_folder_in_place_of_the_file_is_told(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json cannot be read: Is a directory"):
        read_configuration(str(folder))


@pytest.mark.parametrize("value", ["</s>", [2, "</s>"], [[2]], 1.5, True, {"a": 2}])
def test_an_end_of_a_generation_config_that_is_no_token_id_is_told(folder: Path, value) -> None:
    _configure(folder, "generation_config.json", eos_token_id=value)
    with pytest.raises(
        ModelError, match=r"generation_config\.json: eos_token_id: expected a token"
    ):
        read_generation_configuration(str(folder))


def test_a_generation_config_that_transformers_refuses_is_told(folder: Path) -> None:
    _configure(folder, "generation_config.json", cache_implementation="none such")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        read_generation_configuration(str(folder))


def test_without_a_generation_config_the_configuration_is_read(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert read_generation_configuration(str(folder)).eos_token_id == 2
