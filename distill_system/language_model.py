"""The one place that knows Hugging Face causal language models: make, load, read, check.

Trajectories in -> the final hidden state before each response token out; the scorer reads the
teacher and the learner reads the student through the same functions.

Axes: B sequences, L padded length, N response tokens of all sequences in order, H hidden size,
V rows of the unembedding (padded vocabularies included), E size of an input embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distill_system.config.model import ArchitectureConfig
from distill_system.errors import ModelError
from distill_system.records import Trajectory

LanguageModel = Any
"""A transformers PreTrainedModel for causal language modelling; the library ships no types."""

MIN_GROUP, MAX_STRETCH = 16, 2.0
"""Fewest sequences of a group that ends for its padding, and how much longer its longest may be."""

LINEAR_READ_TOLERANCE = 1e-3
"""Largest difference between the model's own logits and hidden state x unembedding, relative."""


@dataclass(frozen=True, slots=True)
class PaddedGroup:
    """Sequences of similar length, right-padded; right padding with causal attention needs no mask.

    input_ids_BL int64; lines_n and columns_n: where the hidden states stand that predict this
    group's response tokens.
    """

    input_ids_BL: Tensor
    lines_n: Tensor
    columns_n: Tensor


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Trajectories as padded groups, and their N response tokens as flat rows in order.

    sequence_ids_N: which trajectory; positions_N: place in its response; token_ids_N: the token;
    order_N: which row of the groups, read one after another, is row n (all int64).
    """

    groups: tuple[PaddedGroup, ...]
    sequence_ids_N: Tensor
    positions_N: Tensor
    token_ids_N: Tensor
    order_N: Tensor

    @classmethod
    def collate(
        cls,
        trajectories: Sequence[Trajectory],
        device: torch.device,
        *,
        max_tokens: int | None = None,
    ) -> SequenceBatch:
        """Group by length, pad each group to its longest; a group has at most max_tokens tokens."""
        lengths = np.array([trajectory.num_response_tokens for trajectory in trajectories])
        first_rows = np.cumsum(lengths) - lengths
        sequence_ids = np.repeat(np.arange(len(trajectories)), lengths)
        positions = np.arange(lengths.sum()) - first_rows[sequence_ids]
        token_ids = np.concatenate([t.response_ids for t in trajectories]).astype(np.int64)
        members = group_by_length([int(t.token_ids.size) for t in trajectories], max_tokens)
        read_order = np.concatenate(
            [first_rows[i] + np.arange(lengths[i]) for group in members for i in group]
        )
        arrays = (sequence_ids, positions, token_ids, np.argsort(read_order))
        return cls(
            tuple(_pad([trajectories[i] for i in group], device) for group in members),
            *(torch.from_numpy(array).to(device) for array in arrays),
        )


def group_by_length(lengths: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    """Indices in ascending length, cut where a group would waste too much or hold too much.

    A group of at least MIN_GROUP sequences ends where the next is more than MAX_STRETCH times as
    long as its first; any group ends where padding it to the next would pass max_tokens.
    """
    groups: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        group = groups[-1]
        stretched = len(group) >= MIN_GROUP and lengths[index] > MAX_STRETCH * lengths[group[0]]
        full = max_tokens is not None and (len(group) + 1) * lengths[index] > max_tokens
        if group and (stretched or full):
            groups.append([])
        groups[-1].append(index)
    return groups


def _pad(trajectories: Sequence[Trajectory], device: torch.device) -> PaddedGroup:
    longest = max(trajectory.token_ids.size for trajectory in trajectories)
    ids_BL = np.zeros((len(trajectories), longest), dtype=np.int64)
    lines, columns = [], []
    for line, trajectory in enumerate(trajectories):
        ids_BL[line, : trajectory.token_ids.size] = trajectory.token_ids
        lines.append(np.full(trajectory.num_response_tokens, line))
        columns.append(np.arange(trajectory.num_prompt_tokens - 1, trajectory.token_ids.size - 1))
    arrays = (ids_BL, np.concatenate(lines), np.concatenate(columns))
    return PaddedGroup(*(torch.from_numpy(array).to(device) for array in arrays))


def read_hidden(model: LanguageModel, batch: SequenceBatch) -> Tensor:
    """The final hidden state (after the last norm) before each response token, [N, H]."""
    rows_nH = [
        model.base_model(input_ids=group.input_ids_BL, use_cache=False).last_hidden_state[
            group.lines_n, group.columns_n
        ]
        for group in batch.groups
    ]
    return torch.cat(rows_nH)[batch.order_N]


def unembedding(model: LanguageModel) -> Tensor:
    """The matrix that turns a final hidden state into logits, [V, H]."""
    return model.get_output_embeddings().weight


def build_language_model(
    architecture: ArchitectureConfig,
    *,
    vocab_size: int,
    pad_token_id: int,
    bos_token_id: int | None,
    eos_token_id: int,
    seed: int,
) -> LanguageModel:
    """A Llama-shaped model with random float32 weights, the same for the same seed."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_heads,
        max_position_embeddings=architecture.max_position_embeddings,
        tie_word_embeddings=architecture.tie_word_embeddings,
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def load_language_model(
    path: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> LanguageModel:
    """Load a pretrained causal language model in evaluation mode (no dropout).

    Raises: ModelError if it cannot be loaded, or is read otherwise than final hidden state times
        unembedding (logit scaling, soft caps, biases), which moment matching relies on.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load a causal language model from {path!r}: {error}. Give a folder with "
            "config.json and *.safetensors, or a model name of the Hugging Face hub"
        ) from error
    model = model.to(device).eval()
    check_linear_read(model, path)
    return model


@torch.no_grad()
def check_linear_read(model: LanguageModel, path: str) -> None:
    """Refuse a model whose logits are not finite, or not its final hidden state x unembedding.

    Raises: ModelError, with the difference seen.
    """
    device = unembedding(model).device
    ids_BL = torch.arange(3, 11, device=device)[None] % unembedding(model).shape[0]
    logits_LV = model(input_ids=ids_BL, use_cache=False).logits[0].float()
    if not logits_LV.isfinite().all():
        raise ModelError(
            f"{path!r} ({type(model).__name__}): expected finite logits, got NaN or infinity. Its "
            "weights are damaged, or too large for the precision they are loaded in"
        )
    hidden_LH = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[0]
    read_LV = (hidden_LH @ unembedding(model).T).float()
    difference = float((logits_LV - read_LV).abs().max() / logits_LV.abs().max().clamp_min(1e-6))
    tolerance = LINEAR_READ_TOLERANCE if read_LV.dtype == hidden_LH.dtype else 2e-2
    if difference > tolerance:
        raise ModelError(
            f"{path!r} ({type(model).__name__}): expected logits = final hidden state x "
            f"unembedding, got a relative difference of {difference:.2e}. Models with logit "
            "scaling, soft caps or output biases are not supported yet"
        )


def load_embedding(
    path: str, *, which: Literal["input", "output"], trust_remote_code: bool = False
) -> Tensor:
    """The input embeddings or the unembedding alone of a saved model, float32 [V, E].

    Reads one tensor from the safetensors files; the model itself is never built in memory.
    Raises: ModelError if the folder holds no such tensor.
    """
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        skeleton.tie_weights()
    inputs, outputs = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    wanted = inputs if which == "input" else outputs
    names = {parameter: name for name, parameter in skeleton.named_parameters()}
    name = names[wanted.weight]
    folder = _local_folder(path)
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
        return tensors.get_tensor(stored.pop()).float()


def _local_folder(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
