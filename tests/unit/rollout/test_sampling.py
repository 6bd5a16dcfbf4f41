import importlib.util
import math
import re
from pathlib import Path

import pytest

from distill_system.errors import ConfigError
from distill_system.rollout.environment import engine_environment
from distill_system.rollout.sampling import Sampling


@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0, 2.5])
def test_temperatures_that_vllm_takes_as_they_are_pass(temperature: float) -> None:
    assert Sampling(temperature=temperature, max_response_tokens=1).temperature == temperature


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0.009),  # vLLM would silently sample at 0.01
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e300),
        ("temperature", 1e-300),
        ("temperature", 100.1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", 0),
        ("min_p", 1.0),
        ("min_p", math.nan),
        ("max_response_tokens", 0),
    ],
)
def test_values_out_of_range_are_refused_by_their_key(key: str, value: float) -> None:
    fields = {"temperature": 1.0, "top_p": 1.0, "max_response_tokens": 8, key: value}
    with pytest.raises(
        ConfigError, match=rf"rollout\.sampling\.{key} .*got {re.escape(str(value))}"
    ):
        Sampling(**fields)  # type: ignore[arg-type]  # a float for each key


def test_compilation_is_left_on_where_there_is_a_gpu() -> None:
    on_cpu, on_gpu = (
        engine_environment(uses_gpu=False, threads=2),
        engine_environment(uses_gpu=True),
    )
    assert on_cpu["TORCHDYNAMO_DISABLE"] == "1"
    assert on_cpu["OMP_NUM_THREADS"] == "2"
    assert not {"TORCHDYNAMO_DISABLE", "OMP_NUM_THREADS"} & on_gpu.keys()
    assert on_gpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def _text_of(package: str, file: str) -> bytes:
    """A file of an installed package, which is not imported."""
    [folder] = importlib.util.find_spec(package).submodule_search_locations
    [path] = Path(folder).glob(file)
    return path.read_bytes()


def test_libraries_read_what_their_environment_tells_them() -> None:
    """A name that a release has changed would be passed over in silence."""
    told = engine_environment(uses_gpu=False)
    known = _text_of("vllm", "envs.py")
    names = [name for name in told if name.startswith("VLLM_")]
    assert len(names) >= 4
    assert [name for name in names if f'"{name}"'.encode() not in known] == []
    binding = f'"{told["VLLM_CPU_OMP_THREADS_BIND"]}"'.encode()
    assert binding in _text_of("vllm", "utils/ompmultiprocessing.py")
    others = [name for name in told if name.startswith("TOKENIZERS_")]
    assert len(others) == 1
    assert others[0].encode() in _text_of("tokenizers", "*.so")
