"""Trajectories as batches that a model reads, and the rows that are read of them.

Axes: B sequences, L padded length, N response tokens of all sequences in order, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill_system.language_model.models import LanguageModel
from distill_system.records import Trajectory

MIN_GROUP, MAX_STRETCH = 16, 2.0
"""Fewest sequences of a group that ends for its padding, and how much longer its longest may be."""


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
