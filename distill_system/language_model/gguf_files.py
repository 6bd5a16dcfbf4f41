"""A .gguf file, the format of llama.cpp, to a folder that transformers, vLLM and we read alike.

One file in -> a folder of safetensors weights, config.json, generation_config.json and tokenizer
out. transformers reads the file; what it would pass over in silence is refused here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.import_utils import is_gguf_available

from distill_system.errors import ModelError
from distill_system.language_model.families import find_family

INSTALL_GGUF = "pip install 'distill-system[gguf]'"

_WITHOUT_EFFECT: dict[str, object] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
}
"""Settings of a model that transformers does not read, with the value that changes nothing."""

_HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")


def is_gguf(path: str) -> bool:
    """Whether a model's path means a .gguf file."""
    return path.lower().endswith(".gguf")


def convert_gguf(file: Path, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a .gguf file's model and tokenizer to `folder`, by a rename; returns the folder.

    Quantised weights are written as the numbers that they stand for. The chat template and the end
    of sequence are the file's.
    dtype: of the weights written; float32 keeps every number of the quantised formats.
    Raises: ModelError for a file that is no model, a family that is not supported, a setting or a
        tensor that transformers would leave out, or if the package gguf is not installed.
    """
    file = file.absolute()
    _require_readable(file)
    settings, tensor_names = _read_header(file)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        config = _read(AutoConfig, file)
        del config._model_name_or_path  # the file's title, which is no setting
        find_family(config, repr(str(file)))
        _require_settings_read(file, settings, config)
        tokenizer = _read(AutoTokenizer, file)
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"{str(file)!r}: its tokenizer has no end-of-sequence token "
                "(tokenizer.ggml.eos_token_id), so no response could end. Choose another file"
            )
        model = _as_plain(_load_model(file, tensor_names, dtype), config)
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _drop_tokens_without_rows(partial / "tokenizer.json", config.vocab_size)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _drop_tokens_without_rows(file: Path, num_rows: int) -> None:
    """Take out the token that transformers adds where a file names no unknown one."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["id"] < num_rows]
    file.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")


def _require_readable(file: Path) -> None:
    if not file.is_file():
        raise ModelError(f"{str(file)!r}: expected a .gguf file, found none")
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic != b"GGUF":
        raise ModelError(
            f"{str(file)!r}: expected a .gguf file, which begins with the letters GGUF, got "
            f"{magic!r} in {file.stat().st_size} bytes. Fetch the file again (a file of some "
            "hundred bytes is a Git LFS pointer: `git lfs pull`)"
        )
    if not is_gguf_available():
        raise ModelError(
            f"{str(file)!r} is a .gguf file, and the package that reads it is not installed. Two "
            f"ways out: {INSTALL_GGUF}, and the same command again, or a folder of the same model "
            "in Hugging Face form"
        )


def _read_header(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The model's settings, without the name of its architecture, and the names of its tensors."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        prefix = f"{reader.fields['general.architecture'].contents()}."
        settings = {
            name.removeprefix(prefix): field.contents()
            for name, field in reader.fields.items()
            if name.startswith(prefix)
        }
    except Exception as error:  # numpy's and struct's own, according to where the file ends
        raise _damaged(file, error) from error
    return settings, [tensor.name for tensor in reader.tensors]


def _read(loader: Any, file: Path, **options: Any) -> Any:
    """What one of transformers' classes makes of the file."""
    try:
        return loader.from_pretrained(file.parent, gguf_file=file.name, **options)
    except Exception as error:  # as above; for another architecture, a ValueError or KeyError
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{str(file)!r}: transformers cannot read it: {type(error).__name__}: {error}. Fetch the "
        "file again, or give a folder of the same model in Hugging Face form"
    )


def _load_model(file: Path, tensor_names: list[str], dtype: torch.dtype) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    model, info = _read(AutoModelForCausalLM, file, dtype=dtype, output_loading_info=True)
    missing, wrong = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    known = get_gguf_hf_weights_map(model, TensorProcessor())
    unread = [name for name in tensor_names if name not in known]
    for problem, names in (
        ("without the tensors", missing),
        ("with tensors of other shapes,", wrong),
        ("with tensors that transformers does not read,", unread),
    ):
        if names:
            raise ModelError(
                f"{str(file)!r}: a {type(model).__name__} {problem} {', '.join(names[:5])} "
                f"({len(names)} in all): it would not be the model that the file holds. Give a "
                "folder of the same model in Hugging Face form"
            )
    return model


def _as_plain(model: Any, config: Any) -> Any:
    """The same weights in a model that can be saved: transformers takes one of .gguf for quantised,
    although its weights are plain numbers by now.
    """
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _require_settings_read(file: Path, settings: dict[str, Any], config: Any) -> None:
    """Refuse settings of the model that transformers passes over and that change its numbers."""
    unread = list(_unread_settings(settings, config))
    if unread:
        raise ModelError(
            f"{str(file)!r}: transformers does not read its settings {', '.join(unread)}, so the "
            "model would compute something else. Give a folder of the same model in Hugging Face "
            "form"
        )


def _unread_settings(settings: dict[str, Any], config: Any) -> Iterator[str]:
    from transformers.integrations import GGUF_CONFIG_MAPPING

    read = GGUF_CONFIG_MAPPING.get(config.model_type, {})
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    harmless = {
        **_WITHOUT_EFFECT,
        **dict.fromkeys(_HEAD_SIZES, head_size),
        "vocab_size": config.vocab_size,
    }
    for name, value in settings.items():
        if read.get(name) is None and not (name in harmless and value == harmless[name]):
            yield f"{name}={value}"
