"""Models too large to hold whole: made without weights, then filled part by part from their files.

A folder or hub name in -> an empty model out; a model whose parameters may be sharded in -> the
same model, every rank having read its own rows of each matrix and no more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import GenerationConfig

from distill_system.errors import ModelError
from distill_system.language_model.configuration_files import read_configuration
from distill_system.language_model.embeddings import local_folder
from distill_system.language_model.encoder_decoder import model_class, tie_weights
from distill_system.language_model.families import find_family, name_in_files
from distill_system.language_model.models import LanguageModel
from distill_system.language_model.packed_attention import choose_attention
from distill_system.language_model.weight_files import holds_two_matrices

Rename = Callable[[str], str | None]
"""A parameter's name in the model -> its name in the files, None if it is not in them."""


def build_empty_model(
    path: str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> LanguageModel:
    """The model of a folder in evaluation mode: parameters on the meta device, no weights.

    Buffers (rotary frequencies among them) are real: they are computed, not stored.
    Raises: ModelError if the folder holds no model of a supported family.
    """
    try:
        config = read_configuration(path, trust_remote_code=trust_remote_code)
        find_family(config, repr(path))
        with init_empty_weights(include_buffers=False):
            model = model_class(config).from_config(
                config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                attn_implementation=choose_attention(config),
            )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot build a language model from {path!r}: {error}. Give a folder with "
            "config.json and *.safetensors, or a model name of the Hugging Face hub"
        ) from error
    folder = local_folder(path)
    tie_weights(model, two_matrices=holds_two_matrices(folder, config))
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def read_weights(
    model: LanguageModel, path: str, *, rename: Rename = lambda name: name, everyone: bool = True
) -> None:
    """Fill the model's parameters from the safetensors files of a folder, cast to their dtype.

    Each rank reads its own part of every sharded parameter. everyone: all ranks of the default
    process group call this together; False reads without any group.
    Raises: ModelError if a parameter is missing from the files or has another shape there.
    """
    reader = HuggingFaceStorageReader(str(local_folder(path)))
    load(_match(model, reader, path, rename), storage_reader=reader, no_dist=not everyone)


def check_streamed(path: str, *, trust_remote_code: bool = False) -> LanguageModel:
    """The empty model of a folder that read_weights can fill; reads the files' headers alone.

    Raises: ModelError where it cannot.
    """
    model = build_empty_model(path, trust_remote_code=trust_remote_code)
    _match(model, HuggingFaceStorageReader(str(local_folder(path))), path, lambda name: name)
    return model


def _match(
    model: LanguageModel, reader: HuggingFaceStorageReader, path: str, rename: Rename
) -> dict[str, Tensor]:
    """The model's parameters by their names in the files.  Raises: see read_weights."""
    stored = reader.read_metadata().state_dict_metadata
    targets: dict[str, Tensor] = {}
    problems: list[str] = []
    for names, parameter in _named_parameters(model):
        wanted = [name for name in map(rename, names) if name is not None]
        if not wanted:
            continue
        name = next((name for name in _spellings(model, wanted) if name in stored), None)
        if name is None:
            problems.append(f"{wanted[0]} is missing")
            continue
        entry = stored[name]
        assert isinstance(entry, TensorStorageMetadata), "safetensors files hold tensors alone"
        if entry.size != parameter.shape:
            problems.append(f"{name} has {list(entry.size)}, expected {list(parameter.shape)}")
        targets[name] = parameter.detach()
    if problems:
        raise ModelError(
            f"{path!r}: its *.safetensors files do not hold the weights of {type(model).__name__}: "
            f"{'; '.join(problems[:5])} ({len(problems)} in all). Load the model in transformers "
            "and save it again, or run with one rank"
        )
    return targets


def _named_parameters(model: LanguageModel) -> list[tuple[list[str], Tensor]]:
    """Every parameter once, with all its names: tied ones have several."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [(every, parameter) for parameter, every in names.items()]


def _spellings(model: LanguageModel, names: list[str]) -> list[str]:
    """The names as files may have them: some leave out the prefix of the base model."""
    prefix = f"{model.base_model_prefix}."
    stored = (name_in_files(model.config, name) for name in names)
    return [*names, *(name.removeprefix(prefix) for name in names), *stored]
