"""A folder's weights are all there, belong to its config.json, and are read alike by everyone."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import save_family
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from distill_system.errors import ModelError
from distill_system.language_model import check_weight_files, load_language_model
from distill_system.language_model.weight_files import INDEX, SINGLE

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "opt", "opt_350m")


def _check(folder: Path) -> None:
    check_weight_files(folder, AutoConfig.from_pretrained(folder))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_family(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


@pytest.fixture
def llama(families, tmp_path: Path) -> Path:
    return shutil.copytree(families("llama"), tmp_path / "model")


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = dict(load_file(folder / SINGLE))
    change(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def _drop(folder: Path, name: str) -> None:
    _change(folder, lambda weights: weights.pop(name))


def _configure(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_whole(families, family: str) -> None:
    _check(families(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_so_is_a_sharded_folder_with_old_buffers(families, tmp_path: Path, family: str) -> None:
    folder = shutil.copytree(families(family), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    index = json.loads((folder / INDEX).read_text())
    first = folder / next(iter(index["weight_map"].values()))
    weights = load_file(first)
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.masked_bias"):
        weights[name] = torch.ones(4)
    weights["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    save_file(weights, first, metadata={"format": "pt"})
    assert len(list(folder.glob("*.safetensors"))) > 1
    _check(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_of_any_family_may_be_missing(families, tmp_path: Path, family: str) -> None:
    """The tensor is named, and the loaders of workers refuse the folder too."""
    folder = shutil.copytree(families(family), tmp_path / "model")
    for name in load_file(folder / SINGLE):
        shutil.copy(families(family) / SINGLE, folder)
        _drop(folder, name)
        with pytest.raises(ModelError, match=r"the weights lack|weights lack tensors") as caught:
            _check(folder)
        assert name in str(caught.value)
    with pytest.raises(ModelError, match="would be random numbers"):
        load_language_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(llama: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _change(llama, lambda weights: weights.update({name: torch.zeros(80, 64)}))
    told = rf"{name} has \[80, 64\], expected \[96, 64\]"
    with pytest.raises(ModelError, match=told):
        _check(llama)
    with pytest.raises(ModelError, match=told):
        load_language_model(str(llama), dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 128},
        {"intermediate_size": 128},
        {"vocab_size": 65},
        {"num_key_value_heads": 2},
        {"head_dim": 64},
    ],
)
def test_another_models_weights_are_refused(llama: Path, change: dict) -> None:
    _configure(llama, **change)
    with pytest.raises(ModelError, match=r"weights are not those of a LlamaForCausalLM.*expected"):
        _check(llama)


@pytest.mark.parametrize("num_layers", [3, 20, 9_999])
def test_more_blocks_than_the_weights_have_are_refused(llama: Path, num_layers: int) -> None:
    _configure(llama, num_hidden_layers=num_layers)
    begin = time.perf_counter()
    with pytest.raises(ModelError, match=r"lack .*layers\.|num_hidden_layers: got 9999"):
        _check(llama)
    assert time.perf_counter() - begin < 20, "no model of so many blocks is built"


def test_fewer_blocks_leave_tensors_over(llama: Path) -> None:
    _configure(llama, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"does not have: model\.layers\.1\..* and 5 more"):
        _check(llama)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "adapter.lora_A", "lm_head.bias"]
)
def test_a_tensor_that_the_model_does_not_have_is_named(llama: Path, name: str) -> None:
    _change(llama, lambda weights: weights.update({name: torch.zeros(64)}))
    with pytest.raises(ModelError, match=f"does not have: {name}"):
        _check(llama)


def test_sizes_that_do_not_go_together_are_told_with_the_file(llama: Path) -> None:
    _configure(llama, hidden_size=10**8, head_dim=10**8, num_attention_heads=10**8)
    with pytest.raises(ModelError, match=r"config\.json: no model can be built from it"):
        check_weight_files(llama, AutoConfig.from_pretrained(llama))


# ---------------------------------------------------------------------------------- damaged files


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def _cut_in_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _lfs_pointer(file: Path) -> None:
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n")


def _text(file: Path) -> None:
    file.write_text("<html>404 Not Found</html>" * 9)


def _lie(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        content = file.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        change(header["model.norm.weight"])
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return write


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_truncate, "do not agree, as in a file that was copied in part"),
        (_cut_in_header, "do not agree, as in a file that was copied in part"),
        (_empty, "the file is empty"),
        (_lfs_pointer, "Git LFS pointer.*git lfs pull"),
        (_text, "expected a safetensors file, got .*header too large"),
        (_lie(lambda tensor: tensor.update(shape=[9999])), "expected a safetensors file, got"),
        (_lie(lambda tensor: tensor.update(dtype="F16")), "expected a safetensors file, got"),
        (
            _lie(lambda tensor: tensor.update(data_offsets=[0, 2**40])),
            "do not agree|expected a safetensors file",
        ),
    ],
)
def test_a_damaged_file_is_told_with_its_path(llama: Path, damage, told: str) -> None:
    damage(llama / SINGLE)
    with pytest.raises(ModelError, match=rf"(?s)model/model\.safetensors.*{told}"):
        _check(llama)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32])
def test_numbers_that_are_no_floats_are_refused(llama: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    _change(llama, lambda weights: weights.update({name: weights[name].to(dtype)}))
    with pytest.raises(ModelError, match=rf"expected weights in .*BF16.* got {name} in "):
        _check(llama)


# ------------------------------------------------------------------------ which files are the model


@pytest.fixture
def sharded(llama: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(llama)
    (llama / SINGLE).unlink()
    model.save_pretrained(llama, max_shard_size="60KB")
    return llama


def test_a_shard_that_is_missing_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"index\.json names {shard.name}, which"):
        _check(sharded)


def test_a_tensor_that_only_the_index_knows_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"that its files do not hold: model\.extra"):
        _check(sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_told_with_its_path(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: expected"):
        _check(sharded)


def test_a_single_file_beside_an_index_of_others_is_refused(sharded: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, sharded / SINGLE)
    with pytest.raises(ModelError, match="transformers would read the one and vLLM the others"):
        _check(sharded)


def test_the_same_tensor_in_two_files_is_refused(sharded: Path) -> None:
    save_file({"model.norm.weight": torch.ones(64)}, sharded / "older.safetensors")
    with pytest.raises(ModelError, match=r"older\.safetensors, which .* same names: model\.norm"):
        _check(sharded)


def test_the_original_format_beside_an_index_is_no_hindrance(sharded: Path) -> None:
    save_file({"layers.0.wq.weight": torch.ones(64)}, sharded / "consolidated.safetensors")
    _check(sharded)


def test_a_second_file_without_an_index_is_refused(llama: Path) -> None:
    save_file({"lora": torch.ones(4)}, llama / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors beside model"):
        _check(llama)


def test_no_weights_at_all_are_told(llama: Path) -> None:
    (llama / SINGLE).rename(llama / "other.safetensors")
    with pytest.raises(ModelError, match=r"expected model\.safetensors or .*found neither"):
        _check(llama)


# --------------------------------------------------------------------------------- tied matrices


def test_an_untied_model_without_its_head_is_told_of_the_setting(llama: Path) -> None:
    _change(llama, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lm_head\.weight .*tie_word_embeddings true"):
        _check(llama)
    _configure(llama, tie_word_embeddings=True)
    _check(llama)


def test_a_tied_model_may_hold_its_matrix_twice_if_both_are_equal(llama: Path) -> None:
    _configure(llama, tie_word_embeddings=True)
    with pytest.raises(ModelError, match="two different matrices"):
        _check(llama)
    embedding = "model.embed_tokens.weight"
    _change(llama, lambda weights: weights.update({"lm_head.weight": weights[embedding].clone()}))
    _check(llama)


def test_a_single_number_that_differs_parts_them(llama: Path) -> None:
    _configure(llama, tie_word_embeddings=True)

    def almost(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["lm_head.weight"][63, 63] += 1e-3

    _change(llama, almost)
    with pytest.raises(ModelError, match="two different matrices"):
        _check(llama)


def test_a_tied_model_holds_the_embeddings_and_not_the_head_alone(llama: Path) -> None:
    _configure(llama, tie_word_embeddings=True)
    _change(llama, lambda weights: weights.pop("model.embed_tokens.weight"))
    with pytest.raises(ModelError, match=r"the weights lack model\.embed_tokens\.weight"):
        _check(llama)


# ---------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize(("family", "accepted"), [("gpt2", True), ("opt", True), ("qwen2", False)])
def test_names_without_the_prefix_pass_where_vllm_adds_it(
    families, tmp_path: Path, family: str, accepted: bool
) -> None:
    folder = shutil.copytree(families(family), tmp_path / "model")
    bare = {n.split(".", 1)[1]: w for n, w in load_file(folder / SINGLE).items()}
    save_file(bare, folder / SINGLE, metadata={"format": "pt"})
    if accepted:
        _check(folder)
        return
    with pytest.raises(ModelError, match="tensors lack the prefix 'model'"):
        _check(folder)


def test_a_model_of_seven_billion_parameters_takes_well_under_a_second(tmp_path: Path) -> None:
    """Headers of its size, over a file with no blocks on the disk; 0.2 s on an idle core."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    header, end = {}, 0
    for name, parameter in model.state_dict().items():
        begin, end = end, end + parameter.numel() * 2
        header[name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    seconds = []
    for _ in range(3):
        begin_seconds = time.perf_counter()
        _check(tmp_path)
        seconds.append(time.perf_counter() - begin_seconds)
    print("seconds", seconds)
    assert min(seconds) < 5, "the bound has room for a busy machine"
