import dataclasses

import pytest
from pydantic import BaseModel, ValidationError

from distill_system.config.rollout import EngineConfig
from distill_system.errors import DistillError, ModelError, ResourceError
from distill_system.rollout.engine import EngineSpecification
from distill_system.rollout.vllm_engine import translate_start_error

SPECIFICATION = EngineSpecification(
    model_path="/models/student",
    config=EngineConfig(kv_cache_mebibytes=8),
    config_key="rollout.student_engine",
    max_model_length=320,
    uses_gpu=False,
    tensor_parallel_size=1,
    weight_transfer_backend="gloo",
    trust_remote_code=False,
)
# As vLLM 0.32 words them.
TOO_SMALL = "To serve at least one request with the model's max seq len (320), 2 GiB KV cache is"
NO_BLOCK = "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
TOO_LARGE = "Available memory on node 0 (6/7 GiB) on kv cache allocation is less than requested"


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (ValueError(TOO_SMALL), ResourceError, "raise rollout.student_engine.kv_cache_mebibytes"),
        (ValueError(NO_BLOCK), ResourceError, "raise rollout.student_engine.kv_cache_mebibytes"),
        (ValueError(TOO_LARGE), ResourceError, "lower rollout.student_engine.kv_cache_mebibytes"),
        (MemoryError(), ResourceError, "lower rollout.student_engine.kv_cache_mebibytes"),
        (RuntimeError("Cannot find any model weights"), ModelError, "/models/student"),
    ],
)
def test_what_vllm_raises_becomes_advice(
    error: Exception, kind: type[DistillError], advice: str
) -> None:
    translated = translate_start_error(SPECIFICATION, error)
    assert type(translated) is kind
    assert advice in str(translated)
    assert str(error) in str(translated)


def test_a_pydantic_error_is_reduced_to_its_sentence() -> None:
    class Model(BaseModel):
        length: int

    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"length": "long"})
    message = str(translate_start_error(SPECIFICATION, caught.value))
    assert "valid integer" in message
    assert "errors.pydantic.dev" not in message
    assert "data.max_prompt_tokens" in message


def test_a_specification_cannot_be_changed_after_the_fact() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SPECIFICATION.max_model_length = 1  # type: ignore[misc]  # the point of the test
