"""The vocabulary that both policies share, and the tokens that end a response."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distill_system.config import RunConfig
from distill_system.config.model import ModelConfig
from distill_system.errors import ModelError
from distill_system.language_model import read_generation_configuration


def vocabulary_size(tokenizer: Any) -> int:
    """Number of tokens that a policy is a distribution over: the tokenizer's largest id + 1.

    Models often pad their embedding to more rows, each model to another number. Those rows stand
    for no token: they are never sampled, and every softmax leaves them out.
    """
    return max(tokenizer.get_vocab().values()) + 1


def stop_token_ids(config: RunConfig, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a response of either model, in ascending order.

    These are the tokenizer's end of sequence and every one that the generation config of teacher or
    student lists. Both models stop at all of them, because the objectives compare the two as
    policies of one decision process, which ends at the same tokens for both.

    Raises: ModelError for a token outside the vocabulary.
    """
    found = {int(tokenizer.eos_token_id): "the tokenizer"}
    for role in ("teacher", "student"):
        model: ModelConfig = getattr(config, role)
        if model.path is not None:
            found |= dict.fromkeys(_listed(model), f"{role}.path={model.path!r}")
    size = vocabulary_size(tokenizer)
    for token, where in found.items():
        if not 0 <= token < size:
            raise ModelError(
                f"{where}: expected end-of-sequence token ids from 0 to {size - 1}, the run's "
                f"vocabulary, got {token}. Correct eos_token_id in its generation_config.json, or "
                "in config.json where there is no such file"
            )
    return tuple(sorted(found))


def check_exportable(role: str, model: ModelConfig) -> None:
    """Check that transformers can write the generation config; it reads some that it cannot write.

    Raises: ModelError.
    """
    try:
        _generation_config(model).validate(strict=True)
    except ValueError as error:
        raise ModelError(
            f"{role}.path={model.path!r}: its generation_config.json could not be saved with the "
            f"trained model. Correct that file. transformers said: {error}"
        ) from error


def _listed(model: ModelConfig) -> Iterator[int]:
    listed = _generation_config(model).eos_token_id
    yield from [listed] if isinstance(listed, int) else (listed or ())


def _generation_config(model: ModelConfig) -> Any:
    assert model.path is not None, "only a pretrained model has a generation config"
    return read_generation_configuration(model.path, trust_remote_code=model.trust_remote_code)
