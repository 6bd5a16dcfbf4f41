"""The learner's model in Hugging Face form on disk, its weights in a precision of choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from distill_system.errors import RunStateError
from distill_system.language_model import LanguageModel

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save_model(
    model: LanguageModel, folder: Path, weights: Mapping[str, Tensor], *, dtype: torch.dtype
) -> None:
    """Write config, generation config and weights; config.json names the weights' precision.

    weights: the whole model's state by name; tensors that share their memory are written once.
    Raises: RunStateError if the disk does not take them.
    """
    try:
        model.save_pretrained(folder, state_dict=_cast(weights, dtype))
        if dtype != model.dtype:
            _name_precision(folder / "config.json", dtype)
    except (OSError, SafetensorError) as error:
        raise RunStateError(str(error)) from error


def _name_precision(path: Path, dtype: torch.dtype) -> None:
    """save_pretrained names the dtype of the model in memory, which is not that of the weights."""
    form = json.loads(path.read_text(encoding="utf-8"))
    form["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(form, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same names in another precision; what was one tensor under two names stays one."""
    cast: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    result = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor = cast.setdefault(key, tensor.to(dtype))
        result[name] = tensor
    return result
