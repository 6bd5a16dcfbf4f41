"""One matrix of a saved model, without the model.

Axes: V tokens, E width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from distill_system.errors import ModelError
from distill_system.language_model.configuration_files import read_configuration
from distill_system.language_model.encoder_decoder import model_class, tie_weights
from distill_system.language_model.families import logit_cap, name_in_files
from distill_system.language_model.weight_files import holds_two_matrices


def load_embedding(
    path: str,
    *,
    which: Literal["input", "output"],
    vocabulary_size: int | None = None,
    trust_remote_code: bool = False,
) -> Tensor:
    """The input embeddings or the unembedding alone of a saved model, float32 [V, E].

    Reads one tensor from the safetensors files; the model itself is never built in memory.
    vocabulary_size: V, if the model has more rows than there are tokens; None: every row.
    Raises: ModelError if the folder holds no such tensor.
    """
    with torch.device("meta"):
        config = read_configuration(path, trust_remote_code=trust_remote_code)
        skeleton = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    folder = local_folder(path)
    tie_weights(skeleton, two_matrices=holds_two_matrices(folder, config))
    inputs, outputs = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    wanted = inputs if which == "input" else outputs
    names = {parameter: name for name, parameter in skeleton.named_parameters()}
    name = name_in_files(config, names[wanted.weight])
    index = folder / "model.safetensors.index.json"
    file = "model.safetensors"
    if index.exists():
        file = json.loads(index.read_text())["weight_map"].get(name, file)
    if not (folder / file).exists():
        raise ModelError(f"{path!r}: expected {file} with the tensor {name!r}, found no such file")
    with safe_open(folder / file, framework="pt") as tensors:
        # Some checkpoints leave out the base model's prefix.
        stored = {name, name.split(".", 1)[-1]} & set(tensors.keys())
        if not stored:
            raise ModelError(f"{path!r}: {file} holds no tensor {name!r}")
        return tensors.get_slice(stored.pop())[:vocabulary_size].float()


def load_logit_cap(path: str, *, trust_remote_code: bool = False) -> float | None:
    """What caps the logits of a saved model; see logit_cap."""
    return logit_cap(read_configuration(path, trust_remote_code=trust_remote_code))


def local_folder(path: str) -> Path:
    """The folder itself, or where a model of the hub lies on this machine."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
