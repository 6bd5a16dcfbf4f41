"""config.json and generation_config.json of a model, read one way and checked before they are used.

A folder or hub name in -> transformers' configuration out, or one ModelError with file and key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from transformers import AutoConfig, GenerationConfig

from distill_system.errors import ModelError

MOST_BLOCKS = 10_000
"""More transformer blocks than any model has: transformers would make a list of that length."""
MOST_POSITIONS = 10**9
"""Longer than any context: vLLM makes a table of so many rows."""
MOST_OF_A_SIZE = 10**8

_BLOCKS = ("num_hidden_layers", "n_layer", "num_layers")
_POSITIONS = ("max_position_embeddings", "n_positions")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "head_dim",
    "word_embed_proj_dim",
)
_LARGEST = {
    **dict.fromkeys(_BLOCKS, MOST_BLOCKS),
    **dict.fromkeys(_POSITIONS, MOST_POSITIONS),
    **dict.fromkeys(_SIZES, MOST_OF_A_SIZE),
}
_MAY_BE_NULL = {"num_key_value_heads", "head_dim", "n_inner", "word_embed_proj_dim"}

_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta")

_LISTS_OF_TOKENS = ("eos_token_id",)
_TOKENS = ("bos_token_id", "pad_token_id")


def read_configuration(path: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a folder or a hub name.

    Raises: ModelError for a file that is not UTF-8, not JSON or no object, a size that is no whole
        number of at least 1 or larger than any model's, a token id that is no number, or whatever
        the family's configuration class refuses.
    """
    file = Path(path) / "config.json"
    if Path(path).is_dir():
        tree = read_json_object(file)
        if problems := list(_find_problems(tree)):
            raise ModelError(
                f"{file}: {'; '.join(problems)}. Correct the file, or give another model"
            )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # by the fault: OSError, KeyError, its validation's own errors
        where = str(file) if Path(path).is_dir() else repr(path)
        raise ModelError(
            f"{where} cannot be read as a model's configuration: {one_line(error)}. Give a folder "
            "that save_pretrained wrote, or a model name of the Hugging Face hub"
        ) from error


def read_generation_configuration(path: str, *, trust_remote_code: bool = False) -> Any:
    """The generation config of generation_config.json, or of config.json without such a file.

    Raises: ModelError, as read_configuration does.
    """
    file = Path(path) / "generation_config.json"
    if file.exists():
        problems = list(_find_token_problems(read_json_object(file)))
        if problems:
            raise ModelError(f"{file}: {'; '.join(problems)}. Correct the file")
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError as error:  # also where the file does not exist, which is no fault
        if file.exists():
            raise ModelError(f"{file} cannot be read: {one_line(error)}") from error
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file} cannot be read: {one_line(error)}. Correct the file") from error
    config = read_configuration(path, trust_remote_code=trust_remote_code)
    return GenerationConfig.from_model_config(config)


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises: ModelError, with the line where the file breaks off.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{file}: expected text in UTF-8, got byte {error.object[error.start]:#04x} at offset "
            f"{error.start}. Fetch the file again"
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: expected JSON, got {error}. Fetch the file again") from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join((str(error).strip() or type(error).__name__).split()).rstrip(".")


def _find_problems(tree: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(tree.get("model_type"), str):
        yield f"model_type: expected the name of a family, got {tree.get('model_type')!r}"
    for key, most in _LARGEST.items():
        value = tree.get(key)
        if key in tree and not (value is None and key in _MAY_BE_NULL):
            if not _is_whole(value) or value < 1:
                yield f"{key}: expected a whole number of at least 1, got {value!r}"
            elif value > most:
                yield f"{key}: expected at most {most}, more than any model has, got {value}"
    for key in _POSITIVE:
        value = tree.get(key, 1.0)
        if not (_is_number(value) and 0 < value < math.inf):
            yield f"{key}: expected a finite number above 0, got {value!r}"
    yield from _find_token_problems(tree)
    yield from _find_head_problems(tree)


def _find_token_problems(tree: Mapping[str, Any]) -> Iterator[str]:
    """Token ids are whole numbers; -1 stands for none in old files."""
    for key in _TOKENS:
        if not (tree.get(key) is None or _is_whole(tree[key])):
            yield f"{key}: expected a token id, got {tree[key]!r}"
    for key in _LISTS_OF_TOKENS:
        value = tree.get(key)
        listed = value if isinstance(value, list) else [value]
        if value is not None and not all(_is_whole(token) for token in listed):
            yield f"{key}: expected a token id or a list of them, got {value!r}"


def _find_head_problems(tree: Mapping[str, Any]) -> Iterator[str]:
    heads, key_heads = tree.get("num_attention_heads"), tree.get("num_key_value_heads")
    if _is_whole(heads) and _is_whole(key_heads) and key_heads > 0 and heads % key_heads:
        expected = f"a multiple of num_key_value_heads={key_heads}"
        yield f"num_attention_heads: expected {expected}, got {heads}"


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
