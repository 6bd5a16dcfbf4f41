"""The tokens of both models, and the tokens that end a response."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_families import save_family
from transformers import AutoTokenizer

from distill_system.config import RunConfig
from distill_system.data import build_tokenizer
from distill_system.errors import ConfigError, ModelError
from distill_system.run.model_checks import check_models, read_facts
from distill_system.run.vocabulary import stop_token_ids, vocabulary_size

Configure = Callable[..., RunConfig]


def _pair(configure: Configure, folder: Path, **of: dict) -> RunConfig:
    """A run of two models made as told."""
    for role, settings in of.items():
        family = settings.pop("family", "llama")
        save_family(folder / role, family, **settings)
    return configure(*(f"{role}.path={folder / role}" for role in of))


def _stops(config: RunConfig) -> tuple[int, ...]:
    tokenizer = build_tokenizer(config, None)
    check_models(config, tokenizer)
    return stop_token_ids(config, tokenizer)


def test_the_vocabulary_reaches_to_the_largest_id_of_any_token(tiny_model_folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder())
    assert vocabulary_size(tokenizer) == len(tokenizer) == 64
    tokenizer.add_tokens(["one more"])
    assert vocabulary_size(tokenizer) == 65


def test_models_of_different_padding_go_together(configure: Configure, tmp_path: Path) -> None:
    pair = _pair(configure, tmp_path, teacher={"num_rows": 96}, student={"num_rows": 70})
    assert _stops(pair) == (2,)


def test_a_response_ends_where_either_model_or_the_tokenizer_ends_it(
    configure: Configure, tmp_path: Path
) -> None:
    pair = _pair(configure, tmp_path, teacher={"end_ids": [9, 7]}, student={"end_ids": 5})
    assert _stops(pair) == (2, 5, 7, 9)


def test_without_a_generation_config_the_models_own_config_says_it(
    configure: Configure, tmp_path: Path
) -> None:
    config = _pair(configure, tmp_path, teacher={}, student={"end_ids": [5, 6]})
    for role, ends in (("teacher", 11), ("student", [12, 13])):
        (tmp_path / role / "generation_config.json").unlink()
        path = tmp_path / role / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends}))
    assert _stops(config) == (2, 11, 12, 13)


def test_an_end_outside_the_vocabulary_is_told(configure: Configure, tmp_path: Path) -> None:
    config = _pair(configure, tmp_path, teacher={"num_rows": 96, "end_ids": [2, 64]}, student={})
    with pytest.raises(ModelError, match=r"teacher\.path=.* ids from 0 to 63, .* got 64"):
        _stops(config)


def test_a_generation_config_that_could_not_be_exported_is_told_at_once(
    configure: Configure, tmp_path: Path
) -> None:
    config = _pair(configure, tmp_path, teacher={}, student={})
    broken = {"temperature": 0.9, "do_sample": False, "eos_token_id": 2}
    (tmp_path / "teacher/generation_config.json").write_text(json.dumps(broken))
    _stops(config)  # the teacher is not exported
    shutil.copy(tmp_path / "teacher/generation_config.json", tmp_path / "student")
    with pytest.raises(ModelError, match=r"(?s)student\.path=.* could not be saved .*temperature"):
        _stops(config)


def test_a_family_that_nobody_tested_is_let_through_to_the_start_check(
    configure: Configure, tmp_path: Path
) -> None:
    pair = _pair(
        configure, tmp_path, teacher={"family": "stablelm"}, student={"family": "stablelm"}
    )
    _stops(pair)
    for role in ("teacher", "student"):
        facts = read_facts(str(tmp_path / role), trust_remote_code=False)
        assert (facts.untested, facts.is_quantised) == ("stablelm", False)


@pytest.mark.parametrize("family", ["gemma2", "falcon", "gpt_oss"])
def test_attention_that_only_vllm_writes_with_is_told_of_the_other_engine(
    configure: Configure, tmp_path: Path, family: str
) -> None:
    config = _pair(configure, tmp_path, teacher={"family": family}, student={})
    _stops(config)
    rollout = config.rollout.model_copy(update={"engine": "transformers"})
    with pytest.raises(ModelError, match=r"teacher\.path=.* Set rollout\.engine=vllm"):
        _stops(config.model_copy(update={"rollout": rollout}))


def test_a_mixture_of_experts_teaches_a_dense_student_and_is_no_student(
    configure: Configure, tmp_path: Path
) -> None:
    _stops(_pair(configure, tmp_path / "teaches", teacher={"family": "mixtral"}, student={}))
    pair = _pair(configure, tmp_path / "learns", teacher={}, student={"family": "mixtral"})
    with pytest.raises(ModelError, match=r"student\.path=.*'mixtral' can teach and not be trained"):
        _stops(pair)


def test_a_setting_that_vllm_does_not_compute_is_refused(
    configure: Configure, tmp_path: Path
) -> None:
    config = _pair(configure, tmp_path, teacher={"family": "gpt2"}, student={"family": "gpt2"})
    _stops(config)
    path = tmp_path / "student/config.json"
    shape = json.loads(path.read_text())
    path.write_text(json.dumps({**shape, "scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(ModelError, match="expected scale_attn_by_inverse_layer_idx=False"):
        _stops(config)


def test_adapters_for_layers_that_the_student_lacks_are_refused(configure: Configure) -> None:
    lora = "distill.update={type: lora, target_modules: [%s]}"
    _stops(configure(lora % "q_proj, down_proj"))
    with pytest.raises(ConfigError, match=r"distill\.update\.target_modules: .* got c_attn"):
        _stops(configure(lora % "q_proj, c_attn"))
