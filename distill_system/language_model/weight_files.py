"""The safetensors files of a folder: which are read, what their headers say, whether all is there.

A folder and its configuration in -> nothing, or one ModelError that names the tensors. Headers are
read and no weights, and transformers' own loader judges them on the meta device: milliseconds for a
model of any size.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging

from distill_system.errors import ModelError
from distill_system.language_model.configuration_files import one_line, read_json_object
from distill_system.language_model.encoder_decoder import may_hold_two_matrices, model_class

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Numbers that weights may be stored in, by their names in a safetensors header."""

LEFT_OVER_BUFFERS = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|\.(attn|attention)\.(masked_)?bias)$"
)
"""Buffers that old versions of transformers stored; vLLM and transformers compute them."""

_WITHOUT_PREFIX = {"gpt2", "opt"}
"""Families whose files may leave out the base model's prefix: vLLM adds it for these alone."""

_LARGEST_HEADER = 100_000_000
"""Bytes that safetensors allows a header; a file of another kind seems to have a longer one."""
_ROWS_AT_ONCE = 4096
_NAMED = 4


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file's header has it.  dtype: by safetensors' name, such as BF16."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def check_weight_files(folder: Path, config: Any, *, trust_remote_code: bool = False) -> None:
    """Check that the folder's files hold the weights of the configuration's model and no others.

    config: transformers' configuration of the same folder.
    Raises: ModelError for a damaged file, a file or tensor that is missing or left over, another
        shape, or numbers that are no floats.
    """
    stored = read_headers(folder)
    _require_floats(folder, stored)
    _require_blocks(folder, stored, config)
    model, info = _judge(folder, stored, deepcopy(config), trust_remote_code)
    require_all_tensors(model, info, str(folder))
    left_over = [n for n in sorted(info["unexpected_keys"]) if not LEFT_OVER_BUFFERS.search(n)]
    if left_over:
        raise ModelError(
            f"{folder}: its weights hold tensors that a {type(model).__name__} of its config.json "
            f"does not have: {_list(left_over)}. config.json and weights do not belong together, "
            "or a setting is missing in config.json. Give the folder that save_pretrained wrote"
        )
    _require_prefix(folder, model, stored)
    _require_tied(folder, model, stored)


def holds_two_matrices(folder: Path, config: Any) -> bool:
    """Whether a T5's files hold an unembedding of its own, see may_hold_two_matrices.

    Equal matrices are one: transformers ties them.  Raises: ModelError for a damaged file.
    """
    if not may_hold_two_matrices(config):
        return False
    stored, pair = read_headers(folder), ("shared.weight", "lm_head.weight")
    return all(name in stored for name in pair) and not _are_equal(stored, *pair)


def require_all_tensors(model: Any, info: Mapping[str, Any], name: str) -> None:
    """Refuse a model some of whose tensors are not those of its files.

    info: what transformers' from_pretrained says with output_loading_info.
    Raises: ModelError, naming the tensors.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        hint = ""
        if any(key.startswith("lm_head") for key in missing):
            hint = " (a model without lm_head has tie_word_embeddings true in its config.json)"
        raise ModelError(
            f"{name}: its weights lack tensors of a {type(model).__name__} of its config.json: "
            f"{_list(missing)}{hint}. They would be random numbers, other ones in every process. "
            "Copy the folder again, or give the folder that save_pretrained wrote"
        )
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        shapes = [f"{key} has {list(has)}, expected {list(wants)}" for key, has, wants in wrong]
        raise ModelError(
            f"{name}: its weights are not those of a {type(model).__name__} of its config.json: "
            f"{_list(shapes)}. Give the folder that model and config.json were saved to together"
        )


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor that transformers, vLLM and we read from the folder, by its name in the files.

    Raises: ModelError for a damaged file, or files that not everyone would read.
    """
    files, listed = _find_files(folder)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in stored:
                raise ModelError(
                    f"{folder}: the tensor {name} stands in {stored[name].file.name} and in "
                    f"{file.name}. Give the folder that save_pretrained wrote"
                )
            stored[name] = tensor
    if absent := sorted(listed - stored.keys()):
        raise ModelError(
            f"{folder / INDEX} names tensors that its files do not hold: {_list(absent)}. Copy the "
            "folder again"
        )
    _refuse_strays(folder, files, stored)
    return stored


def _find_files(folder: Path) -> tuple[list[Path], set[str]]:
    """The files of weights and the names that the index has, if there is one."""
    single, index = folder / SINGLE, folder / INDEX
    if not index.exists():
        if not single.exists():
            raise ModelError(f"{folder}: expected {SINGLE} or {INDEX}, found neither")
        return [single], set()
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: expected weight_map, an object of tensor and file names")
    names = sorted({str(name) for name in weight_map.values()})
    if single.exists() and SINGLE not in names:
        raise ModelError(
            f"{folder} holds {SINGLE} and {INDEX}, which names other files: transformers would "
            "read the one and vLLM the others. Remove those that are not the model"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{index} names {_list(missing)}, which {folder} does not hold. Copy the folder again"
        )
    return [folder / name for name in names], set(weight_map)


def _refuse_strays(folder: Path, files: list[Path], stored: Mapping[str, StoredTensor]) -> None:
    """Other *.safetensors files: without an index vLLM reads them all."""
    for stray in sorted(set(folder.glob("*.safetensors")) - set(files)):
        if not (folder / INDEX).exists():
            raise ModelError(
                f"{folder} holds {stray.name} beside {SINGLE}: vLLM would read both, transformers "
                f"{SINGLE} alone. Move {stray.name} elsewhere"
            )
        if twice := sorted(stored.keys() & _read_header(stray).keys()):
            raise ModelError(
                f"{folder} holds {stray.name}, which {INDEX} does not name, with tensors of the "
                f"same names: {_list(twice)}. Move {stray.name} elsewhere"
            )


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: {_describe_damage(file, error)}") from error


def _describe_damage(file: Path, error: Exception) -> str:
    size = file.stat().st_size
    with file.open("rb") as opened:
        begin = opened.read(64)
    if not size:
        return "the file is empty. Fetch it again"
    if begin.startswith(b"version https://git-lfs"):
        return (
            "the file is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder, or "
            "fetch the model again"
        )
    header = int.from_bytes(begin[:8], "little")
    ends_early = size < header + 8 <= _LARGEST_HEADER
    if ends_early or "not fully covered" in str(error) or "InvalidOffset" in str(error):
        return (
            f"its header and its {size} bytes do not agree, as in a file that was copied in part "
            f"({one_line(error)}). Fetch it again"
        )
    return f"expected a safetensors file, got {one_line(error)}. Fetch it again"


def _require_floats(folder: Path, stored: Mapping[str, StoredTensor]) -> None:
    other = sorted(
        f"{name} in {tensor.dtype}"
        for name, tensor in stored.items()
        if tensor.dtype not in FLOATS and not LEFT_OVER_BUFFERS.search(name)
    )
    if other:
        raise ModelError(
            f"{folder}: expected weights in {', '.join(sorted(FLOATS))}, got {_list(other)}. Its "
            "config.json says nothing of a quantisation. Give the model in bfloat16 or float32"
        )


def _require_blocks(folder: Path, stored: Mapping[str, StoredTensor], config: Any) -> None:
    """A model of more blocks than there are tensors need not be built to be refused."""
    num_blocks = getattr(config, "num_hidden_layers", 0)
    if num_blocks > len(stored):
        raise ModelError(
            f"{folder / 'config.json'}: num_hidden_layers: got {num_blocks}, and the weights hold "
            f"{len(stored)} tensors in all. Give the folder that model and config.json were saved "
            "to together"
        )


def _judge(
    folder: Path, stored: Mapping[str, StoredTensor], config: Any, trust_remote_code: bool
) -> tuple[Any, Mapping[str, Any]]:
    """The empty model, and what transformers says to files of these names and shapes."""
    tensors = {
        name: torch.empty(tensor.shape, dtype=FLOATS.get(tensor.dtype), device="meta")
        for name, tensor in stored.items()
    }
    try:
        with _silence():
            with torch.device("meta"):
                skeleton = model_class(config).from_config(
                    config, trust_remote_code=trust_remote_code
                )
            return type(skeleton).from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # sizes that do not go together end in torch's own errors
        raise ModelError(
            f"{folder / 'config.json'}: no model can be built from it: {one_line(error)}. Correct "
            "the file, or give another model"
        ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No progress bar and no report: what they would say is in the error."""
    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def _require_prefix(folder: Path, model: Any, stored: Mapping[str, StoredTensor]) -> None:
    if model.config.model_type in _WITHOUT_PREFIX:
        return
    own = {*model.state_dict()}
    renamed = sorted(name for name in stored if name not in own and _is_bare(model, name, own))
    if renamed:
        raise ModelError(
            f"{folder}: its tensors lack the prefix {model.base_model_prefix!r}: {_list(renamed)}. "
            "transformers adds it and vLLM does not. Load the model in transformers and save it "
            "again"
        )


def _is_bare(model: Any, name: str, own: set[str]) -> bool:
    return f"{model.base_model_prefix}.{name}" in own


def _require_tied(folder: Path, model: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Where one matrix serves as two, the files hold the first, and the second only if equal."""
    prefix = f"{model.base_model_prefix}."
    has_two = may_hold_two_matrices(model.config)
    for target, source in model.all_tied_weights_keys.items():
        if has_two and target == "lm_head.weight":
            continue
        first, second = (
            next((n for n in (name, name.removeprefix(prefix)) if n in stored), None)
            for name in (source, target)
        )
        if first is None:
            raise ModelError(
                f"{folder}: config.json ties {target} to {source}, and the weights lack {source}. "
                "Load the model in transformers and save it again"
            )
        if second is not None and not _are_equal(stored, first, second):
            raise ModelError(
                f"{folder}: config.json ties {target} to {source}, and the weights hold two "
                "different matrices: vLLM would read one and transformers both. Set "
                "tie_word_embeddings to false in config.json, or remove the second"
            )


def _are_equal(stored: Mapping[str, StoredTensor], first: str, second: str) -> bool:
    if stored[first].shape != stored[second].shape:
        return False
    pairs = zip(_rows(stored[first].file, first), _rows(stored[second].file, second), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def _rows(file: Path, name: str) -> Iterator[Tensor]:
    """A matrix part by part, so that two of them are never in memory whole."""
    with safe_open(file, framework="pt") as opened:
        matrix = opened.get_slice(name)
        for begin in range(0, matrix.get_shape()[0], _ROWS_AT_ONCE):
            yield matrix[begin : begin + _ROWS_AT_ONCE]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
