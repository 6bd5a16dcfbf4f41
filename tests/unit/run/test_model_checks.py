"""What cannot work is refused before any worker is asked for, with the key to change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_families import save_family, save_tokenizer
from transformers import AutoTokenizer

from distill_system.config import RunConfig
from distill_system.data import RunData, build_tokenizer
from distill_system.errors import ConfigError, DataError, ModelError
from distill_system.records import Author, Finish, Trajectory
from distill_system.run.model_checks import (
    CPU_HEAD_SIZES,
    check_data,
    check_folders,
    check_models,
    has_encoder,
    is_local_path,
)

Configure = Callable[..., RunConfig]
MakeFolder = Callable[..., Path]


def _check(config: RunConfig) -> None:
    check_folders(config)
    check_models(config, build_tokenizer(config, None))


def test_models_that_fit_one_another_pass(configure: Configure) -> None:
    config = configure()
    _check(config)
    assert config.teacher.path != config.student.path, "two models, not one with itself"


def test_more_of_the_teachers_tokens_than_there_are_is_refused(configure: Configure) -> None:
    objective = "{type: token_matching, on_policy: {type: top_k, k: %d}}"
    num_rows = len(build_tokenizer(configure(), None))
    _check(configure(f"distill.objective={objective % num_rows}"))
    with pytest.raises(
        ConfigError, match=rf"on_policy\.k must be .* {num_rows}, got {num_rows + 1}"
    ):
        _check(configure(f"distill.objective={objective % (num_rows + 1)}"))


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("/data/model", True),
        ("./model", True),
        ("../model", True),
        ("~/model", True),
        ("runs/demo/teacher", True),
        ("Qwen/Qwen2.5-0.5B", False),
        ("gpt2", False),
    ],
)
def test_a_folder_is_told_from_a_hub_name(path: str, local: bool) -> None:
    assert is_local_path(path) is local


def test_a_relative_folder_that_exists_is_no_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_local_path("models/mine")


@pytest.mark.parametrize("key", ["teacher.path", "student.path", "tokenizer.path"])
def test_a_folder_that_is_not_there_is_told_with_its_key(configure: Configure, key: str) -> None:
    with pytest.raises(ModelError, match=rf"{key}='runs/of/nobody': .* no such folder"):
        _check(configure(f"{key}=runs/of/nobody"))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_part_of_the_model_is_told(
    configure: Configure, tiny_model_folder: MakeFolder, tmp_path: Path, missing: str
) -> None:
    shutil.copytree(tiny_model_folder(), tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    suffix = missing.split(".")[1]
    with pytest.raises(ModelError, match=rf"student\.path=.*found no .*{suffix} in it"):
        _check(configure(f"student.path={tmp_path / 'model'}"))


def test_a_broken_tokenizer_of_the_student_is_told(
    configure: Configure, tiny_model_folder: MakeFolder, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_folder(), tmp_path / "model")
    (tmp_path / "model/tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"student\.path=.* cannot be read"):
        _check(configure(f"student.path={tmp_path / 'model'}"))


def test_another_vocabulary_is_told_with_words_that_differ(
    configure: Configure, tiny_model_folder: MakeFolder
) -> None:
    folder = tiny_model_folder(vocab_size=66)
    with pytest.raises(ModelError) as caught:
        _check(configure(f"student.path={folder}"))
    message = str(caught.value)
    assert "tokenizer of 66 tokens differs from the run's tokenizer of 64 in 2 tokens" in message
    assert "['w64', 'w65']" in message


def test_a_tokenizer_larger_than_its_own_model_is_told(
    configure: Configure, tiny_model_folder: MakeFolder, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_folder(vocab_size=64), tmp_path / "model")
    save_tokenizer(tmp_path / "model", 80)
    both = (f"{role}.path={tmp_path / 'model'}" for role in ("teacher", "student"))
    with pytest.raises(ModelError, match=r"teacher\.path=.*64 rows is smaller .* 80 tokens"):
        _check(configure(*both))


def test_a_context_that_is_too_short_is_told_with_both_keys(
    configure: Configure, tiny_model_folder: MakeFolder
) -> None:
    folder = tiny_model_folder(max_position_embeddings=12)
    with pytest.raises(ModelError) as caught:
        _check(configure(f"student.path={folder}"))
    message = str(caught.value)
    assert "reads at most 12 tokens" in message
    assert "data.max_prompt_tokens + rollout.sampling.max_response_tokens = 16" in message


def test_a_head_that_vllm_cannot_compute_on_a_cpu_is_told(
    configure: Configure, tiny_model_folder: MakeFolder
) -> None:
    folder = tiny_model_folder(num_heads=4)  # 64 / 4 = 16
    with pytest.raises(
        ModelError, match=r"student\.path=.* got 16\. .*pools\.student_rollout\.gpus"
    ):
        _check(configure(f"student.path={folder}"))
    on_gpu = ("pools.student_rollout.gpus=1", "pools.learner.gpus=1")
    _check(configure(f"student.path={folder}", *on_gpu))


def test_a_head_of_an_architecture_is_checked_too(configure: Configure) -> None:
    shape = "{hidden_size: 96, intermediate_size: 64, num_layers: 1, num_heads: 4}"
    config = configure(
        "student.path=null",
        "student={architecture: " + shape + ", sft: {steps: 1, optimizer: {learning_rate: 0.1}}}",
        "data.student_sft={type: jsonl, path: rows.jsonl}",
    )
    with pytest.raises(ConfigError, match=r"student\.architecture: .* got 24 .*num_heads=4"):
        _check(config)


def test_the_head_sizes_are_those_of_the_installed_vllm() -> None:
    cpu_attention = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
    sizes = cpu_attention.CPUAttentionBackend.get_supported_head_sizes()
    assert tuple(sizes) == CPU_HEAD_SIZES


def _row(num_tokens: int) -> Trajectory:
    return Trajectory(
        trajectory_id=f"student_sft:{num_tokens}",
        prompt_id="p",
        author=Author.DATASET,
        token_ids=np.ones(num_tokens, dtype=np.int32),
        num_prompt_tokens=1,
        behaviour_logprobs=np.empty(0, dtype=np.float32),
        temperature=1.0,
        finish=Finish.STOP,
    )


def test_a_supervised_row_longer_than_the_model_reads_is_named(configure: Configure) -> None:
    config = configure()
    check_data(config, RunData(student_sft=(_row(5), _row(128))))
    with pytest.raises(DataError, match=r"the teacher \(teacher\.path\) reads at most 128"):
        check_data(config, RunData(preferences=(_row(129), _row(5))))
    with pytest.raises(DataError, match=r"'student_sft:129' has 129 tokens.*student.*at most 128"):
        check_data(config, RunData(student_sft=(_row(5), _row(129), _row(9))))


def test_the_runs_tokenizer_may_come_from_a_folder_of_its_own(
    configure: Configure, tiny_model_folder: MakeFolder, tmp_path: Path
) -> None:
    AutoTokenizer.from_pretrained(tiny_model_folder()).save_pretrained(tmp_path / "tokenizer")
    config = configure(f"tokenizer.path={tmp_path / 'tokenizer'}")
    _check(config)
    with pytest.raises(ModelError, match="tokenizer"):
        _check(configure(f"tokenizer.path={tmp_path / 'nothing'}"))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_damaged_weights_are_told_with_key_and_file(
    configure: Configure, tiny_model_folder: MakeFolder, tmp_path: Path, role: str
) -> None:
    shutil.copytree(tiny_model_folder(), tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=rf"{role}\.path: .*safetensors: the file is empty"):
        check_folders(configure(f"{role}.path={tmp_path / 'model'}"))


def test_weights_in_the_old_format_are_told_with_the_lines_that_convert_them(
    configure: Configure, tiny_model_folder: MakeFolder, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_folder(), tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    torch.save(weights, tmp_path / "model/pytorch_model.bin")
    check_folders(configure(f"student.path={tmp_path / 'model'}"))  # safetensors are there as well
    (tmp_path / "model/model.safetensors").unlink()
    told = r"student\.path=.* found pytorch_model\.bin.*save_pretrained\(NEW\)"
    with pytest.raises(ModelError, match=told):
        check_folders(configure(f"student.path={tmp_path / 'model'}"))


def test_a_setting_that_one_library_passes_over_is_told_with_the_key(
    configure: Configure, tiny_model_folder: MakeFolder, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_folder(), tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "logit_scale": 0.25}))
    with pytest.raises(ModelError, match=r"teacher\.path=.*logit_scale: expected 1\.0, got 0\.25"):
        _check(configure(f"teacher.path={tmp_path / 'model'}"))


@pytest.fixture
def encoder_decoder(tmp_path: Path) -> str:
    return str(save_family(tmp_path / "t5", "t5"))


def test_two_encoder_decoders_pass_with_the_engine_that_generates_with_them(
    configure: Configure, encoder_decoder: str
) -> None:
    both = (f"teacher.path={encoder_decoder}", f"student.path={encoder_decoder}")
    config = configure(*both, "rollout.engine=transformers")
    _check(config)
    assert has_encoder(config)
    assert not has_encoder(configure())
    with pytest.raises(
        ConfigError, match=r"vLLM does not generate .* rollout\.engine=transformers"
    ):
        _check(configure(*both))
    store = ("distill.off_policy_source=store", "data.trajectory_store=somewhere")
    with pytest.raises(ConfigError, match=r"off_policy_source=store: .* use teacher or dataset"):
        _check(configure(*both, "rollout.engine=transformers", *store))
    text = ("distill.language_model={}", "data.plain_text={type: jsonl, path: texts.jsonl}")
    with pytest.raises(ConfigError, match=r"language_model reads plain text, .* expected null"):
        _check(configure(*both, "rollout.engine=transformers", *text))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_an_encoder_decoder_beside_a_decoder_is_refused(
    configure: Configure, encoder_decoder: str, role: str
) -> None:
    config = configure(f"{role}.path={encoder_decoder}", "rollout.engine=transformers")
    with pytest.raises(ModelError, match=f"the {role} is an encoder-decoder and the other model"):
        _check(config)


def test_a_decoder_cut_from_an_encoder_decoder_is_refused(
    configure: Configure, encoder_decoder: str
) -> None:
    file = Path(encoder_decoder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "is_encoder_decoder": False}))
    with pytest.raises(ModelError, match=r"expected is_encoder_decoder=True .* got False"):
        _check(configure(f"student.path={encoder_decoder}", "rollout.engine=transformers"))


def test_heads_that_vllm_does_not_compute_pass_with_the_other_engine(
    configure: Configure, tiny_model_folder: MakeFolder
) -> None:
    folder = tiny_model_folder(num_heads=4)
    _check(configure(f"student.path={folder}", "rollout.engine=transformers"))


def test_a_teacher_that_ranks_cannot_share_is_told_before_they_start(
    configure: Configure, tiny_model_folder: MakeFolder, tmp_path: Path
) -> None:
    _check(configure("scoring.shard_ranks=2"))
    stacked = save_family(tmp_path / "mixture", "qwen3_moe")  # experts one by one in its files
    with pytest.raises(ModelError, match=r"do not hold the weights of Qwen3Moe.*with one rank"):
        _check(
            configure(
                "scoring.shard_ranks=2", f"teacher.path={stacked}", "tokenizer.type=pretrained"
            )
        )
    quantised = tmp_path / "quantised"
    shutil.copytree(tiny_model_folder(seed=1), quantised)
    settings = json.loads((quantised / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "hqq"}
    (quantised / "config.json").write_text(json.dumps(settings))
    config = configure("scoring.shard_ranks=2", f"teacher.path={quantised}")
    with pytest.raises(ModelError, match=r"its weights are quantised.*Set scoring.shard_ranks=1"):
        check_models(config, build_tokenizer(config, None))
