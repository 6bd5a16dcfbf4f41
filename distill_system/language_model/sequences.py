"""Trajectories as packed lines that a model reads, and the rows that are read of them.

Axes: T tokens of one part, n response tokens of one part, N response tokens of all sequences in
order, H hidden size.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill_system.language_model.encoder_decoder import (
    EncodedPart,
    encode_part,
    read_encoded_part,
)
from distill_system.language_model.models import LanguageModel
from distill_system.language_model.packed_attention import PackedLayout, read_line
from distill_system.records import Trajectory, deal_by_cost


@dataclass(frozen=True, slots=True)
class PackedPart:
    """What one forward pass reads: sequences one after another in one line, without padding.

    input_ids_1T int64; layout: where the sequences end; columns_n: where the hidden states stand
    that predict this part's response tokens; rows_n: which rows of the batch those are (int64).
    A part without sequences holds one token, of which nothing is read.
    """

    input_ids_1T: Tensor
    layout: PackedLayout
    columns_n: Tensor
    rows_n: Tensor


Part = PackedPart | EncodedPart
"""What one forward pass reads, by the kind of model."""


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Trajectories as parts, packed or encoded, and their N response tokens as flat rows in order.

    sequence_ids_N: which trajectory; positions_N: place in its response; token_ids_N: the token;
    order_N: which row of the parts, read one after another, is row n (all int64).
    """

    parts: tuple[Part, ...]
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
        num_parts: int | None = None,
        decoder_start: int | None = None,
    ) -> SequenceBatch:
        """Deal the trajectories to parts of near-equal tokens.

        max_tokens: most tokens of a part, prompts included; a longer sequence stands alone.
        num_parts: make exactly so many parts, whatever they hold (some may be empty); without it,
            as few as max_tokens allows, or one.
        decoder_start: the first token of an encoder-decoder's decoder; None: the model has none.
        """
        lengths = [int(trajectory.token_ids.size) for trajectory in trajectories]
        if num_parts is None:
            num_parts = max(1, count_parts(lengths, max_tokens))
        responses = np.array([t.num_response_tokens for t in trajectories], dtype=np.int64)
        first_rows = np.cumsum(responses) - responses
        sequence_ids = np.repeat(np.arange(len(trajectories)), responses)
        positions = np.arange(responses.sum()) - first_rows[sequence_ids]
        token_ids = np.concatenate([t.response_ids for t in trajectories] or [positions])
        parts = tuple(
            _lay_out([(trajectories[i], int(first_rows[i])) for i in hand], device, decoder_start)
            for hand in deal_by_cost(lengths, num_parts)
        )
        order_N = torch.cat([part.rows_n for part in parts]).argsort()
        arrays = (sequence_ids, positions, token_ids.astype(np.int64))
        # Not waited for: a GPU may still be at the update before this step.
        sequence_ids_N, positions_N, token_ids_N = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in arrays
        )
        return cls(parts, sequence_ids_N, positions_N, token_ids_N, order_N)


def count_parts(lengths: Sequence[int], max_tokens: int | None) -> int:
    """How many parts collate makes of sequences of these lengths; 0 of none.

    Parts balanced by deal_by_cost hold at most max_tokens each; a longer sequence stands alone.
    """
    if max_tokens is None or not lengths:
        return min(1, len(lengths))

    def fits(num_parts: int) -> bool:
        hands = deal_by_cost(lengths, num_parts)
        return all(len(hand) == 1 or sum(lengths[i] for i in hand) <= max_tokens for hand in hands)

    # More parts never make the fullest one fuller, so the first number that fits can be bisected.
    fewest = -(-sum(min(length, max_tokens) for length in lengths) // max_tokens)
    candidates = range(fewest, len(lengths) + 1)
    return candidates[bisect_left(candidates, True, key=fits)]


def _lay_out(
    members: Sequence[tuple[Trajectory, int]], device: torch.device, decoder_start: int | None
) -> Part:
    """members: each trajectory with the batch's row of its first response token."""
    if decoder_start is None:
        return _pack(members, device)
    return encode_part(members, device, decoder_start=decoder_start)


def _pack(members: Sequence[tuple[Trajectory, int]], device: torch.device) -> PackedPart:
    if not members:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        return PackedPart(token, PackedLayout.build([1], device), nothing, nothing)
    # Neighbours of similar length spare padding where attention lays them out as rectangles.
    members = sorted(members, key=lambda member: member[0].token_ids.size)
    lengths = [int(trajectory.token_ids.size) for trajectory, _ in members]
    columns, rows = [], []
    for (trajectory, first_row), end in zip(members, np.cumsum(lengths), strict=True):
        count = trajectory.num_response_tokens
        columns.append(np.arange(end - count - 1, end - 1))
        rows.append(np.arange(first_row, first_row + count))
    ids_1T = np.concatenate([t.token_ids for t, _ in members]).astype(np.int64)[None]
    arrays = (ids_1T, np.concatenate(columns), np.concatenate(rows))
    input_ids_1T, columns_n, rows_n = (
        torch.from_numpy(array).to(device, non_blocking=True) for array in arrays
    )
    return PackedPart(input_ids_1T, PackedLayout.build(lengths, device), columns_n, rows_n)


def read_part(model: LanguageModel, part: Part) -> Tensor:
    """The final hidden state (after the last norm) before each response token of a part, [n, H].

    An empty part gives [0, H] that still hangs on the model: a rank without sequences runs the
    same forward and backward passes as the others.
    """
    if isinstance(part, EncodedPart):
        return read_encoded_part(model, part)
    return read_line(model, part.input_ids_1T, part.layout).index_select(0, part.columns_n)


def read_hidden(model: LanguageModel, batch: SequenceBatch) -> Tensor:
    """The final hidden state (after the last norm) before each response token, [N, H]."""
    return torch.cat([read_part(model, part) for part in batch.parts])[batch.order_N]
