"""Quantised folders teach where they can be loaded, else one message says why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_families import save_family

from distill_system.errors import ModelError
from distill_system.language_model import check_quantised, is_quantised, read_configuration

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
ABSENT: dict[str, dict[str, Any]] = {
    "awq": AWQ,
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "hqq": {"quant_method": "hqq"},
    "aqlm": {"quant_method": "aqlm"},
    "eetq": {"quant_method": "eetq"},
}
"""Methods whose packages are not among ours."""


def _check(settings: dict[str, Any] | None, *, is_trained=False, on_gpu=False) -> None:
    config = SimpleNamespace(quantization_config=settings)
    check_quantised(config, "teacher.path='x'", is_trained=is_trained, on_gpu=on_gpu)


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("method", ABSENT)
def test_a_method_whose_package_is_not_there_is_told(method: str, on_gpu: bool) -> None:
    with pytest.raises(
        ModelError, match=rf"teacher\.path='x': .*by {method}: .*dequantize"
    ) as told:
        _check(ABSENT[method], on_gpu=on_gpu)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quant_method": "nonsense"}, "by nonsense: Unknown quantization type"),
        ({"bits": 4}, "by an unnamed method: quantization_config names no quant_method"),
    ],
)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_what_transformers_does_not_know_is_told(settings: dict, told: str, on_gpu: bool) -> None:
    with pytest.raises(ModelError, match=told):
        _check(settings, on_gpu=on_gpu)


def test_no_quantised_model_is_trained() -> None:
    with pytest.raises(ModelError, match="can teach and not be trained"):
        _check({"quant_method": "mxfp4"}, is_trained=True)


def test_what_transformers_reads_without_a_package_may_teach() -> None:
    _check({"quant_method": "mxfp4"})


def test_a_plain_model_is_not_asked() -> None:
    _check(None, is_trained=True)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_folder_says_so_in_its_configuration(tmp_path: Path, key: str) -> None:
    folder = save_family(tmp_path / "plain", "llama")
    assert not is_quantised(read_configuration(str(folder)))
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: AWQ}))
    config = read_configuration(str(tmp_path / "other"))
    assert is_quantised(config)
    with pytest.raises(ModelError, match="by awq"):
        check_quantised(config, "x", is_trained=False, on_gpu=False)
