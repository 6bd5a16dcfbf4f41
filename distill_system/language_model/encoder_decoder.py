"""Encoder-decoder models: trajectories laid out for one, and read by it.

The prompt is the encoder's input. The decoder reads its start token and the response but for the
last token, so that its hidden state at each place comes before one response token; from there on a
row is a row, whoever read it.

Axes: B sequences of a rectangle, P tokens of its longest prompt, T of its longest response, n
response tokens of one part, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from distill_system.errors import ModelError
from distill_system.language_model.packed_attention import group_by_length
from distill_system.records import Trajectory


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Sequences of similar length, padded behind: the encoder masks it, the decoder looks back.

    prompt_ids_BP, decoder_ids_BT: int64. is_prompt_BP: bool. slots_n: where the hidden states stand
    that are read, among B x T, int64.
    """

    prompt_ids_BP: Tensor
    is_prompt_BP: Tensor
    decoder_ids_BT: Tensor
    slots_n: Tensor


@dataclass(frozen=True, slots=True)
class EncodedPart:
    """What one forward pass of an encoder-decoder reads.

    rows_n: which rows of the batch the rectangles' slots are, one after another, int64.
    A part without sequences holds one token on either side, of which nothing is read.
    """

    rectangles: tuple[Rectangle, ...]
    rows_n: Tensor


def model_class(config: Any) -> Any:
    """The class of transformers that loads the language model of a configuration."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def may_hold_two_matrices(config: Any) -> bool:
    """Whether a T5's unembedding may be a matrix of its own, as that of T5 1.1 and Flan-T5.

    Their config.json says tie_word_embeddings=false. transformers 5 makes true of it, keeps what it
    said as scale_decoder_outputs, and reads two matrices where the files hold two.
    """
    return config.model_type == "t5" and not config.scale_decoder_outputs


def tie_weights(model: Any, *, two_matrices: bool) -> None:
    """Tie an empty model's parameters as its files do.  two_matrices: see may_hold_two_matrices."""
    model.tie_weights()
    if two_matrices:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
        model.all_tied_weights_keys.pop("lm_head.weight")


def find_decoder_start(model: Any) -> int | None:
    """The token that a decoder begins with; None of a model without an encoder.

    Raises: ModelError if an encoder-decoder does not say it.
    """
    if not model.config.is_encoder_decoder:
        return None
    said = (model.config, getattr(model, "generation_config", None))
    starts = [getattr(config, "decoder_start_token_id", None) for config in said]
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise ModelError(
            f"{model.config.name_or_path!r} ({type(model).__name__}): expected the token that its "
            "decoder begins with, found none. Give decoder_start_token_id in its config.json"
        )
    return int(start)


def encode_part(
    members: Sequence[tuple[Trajectory, int]], device: torch.device, *, decoder_start: int
) -> EncodedPart:
    """members: each trajectory with the batch's row of its first response token."""
    if not members:
        empty = _rectangle([(np.zeros(1, np.int64), np.zeros(0, np.int64))], decoder_start, device)
        return EncodedPart((empty,), torch.zeros(0, dtype=torch.int64, device=device))
    members = sorted(members, key=lambda member: member[0].token_ids.size)
    lengths = np.array([trajectory.token_ids.size for trajectory, _ in members])
    cuts = np.cumsum([0, *(len(group) for group in group_by_length(lengths))])
    rectangles, rows = [], []
    for first, end in pairwise(cuts):
        group = members[first:end]
        pairs = [(t.token_ids[: t.num_prompt_tokens], t.response_ids) for t, _ in group]
        rectangles.append(_rectangle(pairs, decoder_start, device))
        rows += [np.arange(row, row + t.num_response_tokens) for t, row in group]
    return EncodedPart(tuple(rectangles), torch.from_numpy(np.concatenate(rows)).to(device))


def _rectangle(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], decoder_start: int, device: torch.device
) -> Rectangle:
    """pairs: prompt and response of each sequence; a response may be empty."""
    prompts, responses = zip(*pairs, strict=True)
    longest = max(1, *(response.size for response in responses))
    prompt_ids_BP = np.zeros((len(pairs), max(prompt.size for prompt in prompts)), np.int64)
    decoder_ids_BT = np.full((len(pairs), longest), decoder_start, np.int64)
    slots = []
    for row, (prompt, response) in enumerate(pairs):
        prompt_ids_BP[row, : prompt.size] = prompt
        decoder_ids_BT[row, 1 : response.size] = response[:-1]
        slots.append(row * longest + np.arange(response.size))
    sizes = np.array([prompt.size for prompt in prompts])
    is_prompt_BP = np.arange(prompt_ids_BP.shape[1]) < sizes[:, None]
    arrays = (prompt_ids_BP, is_prompt_BP, decoder_ids_BT, np.concatenate(slots))
    return Rectangle(*(torch.from_numpy(array).to(device) for array in arrays))


def read_encoded_part(model: Any, part: EncodedPart) -> Tensor:
    """The final hidden state before each response token of a part, [n, H]; see scale_of."""
    hidden = [
        _read(model, rectangle).flatten(0, 1).index_select(0, rectangle.slots_n)
        for rectangle in part.rectangles
    ]
    return torch.cat(hidden)


def _read(model: Any, rectangle: Rectangle) -> Tensor:
    """The decoder's final hidden states, [B, T, H]."""
    encoded_BPH = model.get_encoder()(
        input_ids=rectangle.prompt_ids_BP, attention_mask=rectangle.is_prompt_BP
    ).last_hidden_state
    hidden_BTH: Tensor = model.get_decoder()(
        input_ids=rectangle.decoder_ids_BT,
        encoder_hidden_states=encoded_BPH,
        encoder_attention_mask=rectangle.is_prompt_BP,
        use_cache=False,
    ).last_hidden_state
    return hidden_BTH * scale_of(model)


def scale_of(model: Any) -> float:
    """What a hidden state is multiplied by before the unembedding.

    T5 with tied matrices divides by the root of its width. Here that is part of the hidden state,
    so that logits are hidden state times unembedding as in every other family.
    """
    if not getattr(model.config, "scale_decoder_outputs", False):
        return 1.0
    return float(model.config.d_model**-0.5)


@torch.no_grad()
def read_one(model: Any, prompt: Sequence[int], response: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Of one sequence, unpadded: transformers' own logits [T, V] and our hidden states [T, H]."""
    start = find_decoder_start(model)
    assert start is not None, "the model is an encoder-decoder"
    device = model.get_output_embeddings().weight.device
    pair = (np.array(prompt, np.int64), np.array(response, np.int64))
    rectangle = _rectangle([pair], start, device)
    logits = model(
        input_ids=rectangle.prompt_ids_BP,
        decoder_input_ids=rectangle.decoder_ids_BT,
        use_cache=False,
    ).logits[0]
    return logits, _read(model, rectangle)[0]


@torch.no_grad()
def read_beside(
    model: Any, prompt: Sequence[int], response: Sequence[int], others: Sequence[int]
) -> Tensor:
    """Our hidden states of the same sequence below a longer one, [T, H]."""
    start = find_decoder_start(model)
    assert start is not None, "the model is an encoder-decoder"
    device = model.get_output_embeddings().weight.device
    pair = (np.array(prompt, np.int64), np.array(response, np.int64))
    longer = (np.array(others, np.int64), np.array(others, np.int64))
    return _read(model, _rectangle([longer, pair], start, device))[1, : len(response)]
