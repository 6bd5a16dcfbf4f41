"""The key-value cache of sequences that run together, join and leave.

All sequences share columns: each one's tokens stand next to one another and end in the last column,
so that a new token of all of them is one column more. What stands before a sequence's first column
belongs to nobody and is masked; `starts_B` says where each begins.

Axes: B sequences, h key-value heads, T new columns, C columns that there is room for, d head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

_SPARE_COLUMNS = 32
"""Room beyond what is needed, so that the buffers grow once in so many tokens and not with each."""


class RunningLayer(CacheLayerMixin):  # type: ignore[misc]  # untyped base
    """One layer's keys and values in buffers with room for columns to come.

    keys, values: what is filled, [B, h, length, d], views of the buffers.
    """

    length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty buffers of these states' rows, heads and dtype."""
        self.buffers = [states.new_empty(0) for states in (key_states, value_states)]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns [B, h, T, d]; returns all that are filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        new = (key_states, value_states)
        if self.buffers[0].ndim == 1 or end > self.buffers[0].shape[2]:
            self.buffers = [_grown(*pair, end) for pair in zip(self.buffers, new, strict=True)]
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[:, :, self.length : end] = states
        self._show(end)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask has, and the first one's number; see transformers."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Filled columns."""
        return self.length

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def select(self, rows_B: Tensor, first_column: int) -> None:
        """Keep these sequences, and the columns from this one on."""
        filled = (self.keys, self.values)
        self.buffers = [states[:, :, first_column:].index_select(0, rows_B) for states in filled]
        self._show(self.length - first_column)

    def join(self, other: RunningLayer) -> None:
        """Put another's sequences below these; the last columns meet."""
        length = max(self.length, other.length)
        pairs = zip((self.keys, self.values), (other.keys, other.values), strict=True)
        self.buffers = [_stacked(*pair, length) for pair in pairs]
        self._show(length)

    def _show(self, length: int) -> None:
        self.length = length
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


class RunningCache(Cache):  # type: ignore[misc]  # untyped base
    """A cache that a transformers decoder fills, and the first column of each sequence.

    starts_B: int64.
    """

    def __init__(self, starts_B: Tensor) -> None:
        super().__init__(layer_class_to_replicate=RunningLayer)
        self.starts_B = starts_B

    @property
    def length(self) -> int:
        """Columns that are filled."""
        return int(self.layers[0].length) if self.layers else 0

    def see(self, num_new: int) -> tuple[Tensor, Tensor]:
        """For num_new further columns: which columns each sequence sees, bool [B, length + T], and
        the new ones' places in it, int64 [B, T]; 0 before its first.
        """
        columns_C = torch.arange(self.length + num_new, device=self.starts_B.device)
        places_BC = columns_C - self.starts_B[:, None]
        return places_BC >= 0, places_BC[:, self.length :].clamp_min(0)

    def select(self, rows_B: Tensor, first_column: int) -> None:
        """Keep these sequences, in this order; no kept one begins before first_column."""
        for layer in self.layers:
            layer.select(rows_B, first_column)
        self.starts_B = self.starts_B[rows_B] - first_column

    @property
    def filled(self) -> list[Tensor]:
        """Keys and values of every layer."""
        return [states for layer in self.layers for states in (layer.keys, layer.values)]

    def join(self, other: RunningCache) -> None:
        """Put another's sequences below these."""
        length = max(self.length, other.length)
        self.starts_B = torch.cat(
            [cache.starts_B + (length - cache.length) for cache in (self, other)]
        )
        for mine, others in zip(self.layers, other.layers, strict=True):
            mine.join(others)


class RunningEncodedCache(EncoderDecoderCache):  # type: ignore[misc]  # untyped base
    """The caches of a decoder whose sequences have an encoder's states beside their own tokens.

    encoded_starts_B: int64, the first column of each sequence among the encoder's.
    """

    def __init__(self, starts_B: Tensor, encoded_starts_B: Tensor) -> None:
        super().__init__(RunningCache(starts_B), RunningCache(encoded_starts_B))

    @property
    def length(self) -> int:
        """Columns that are filled, of the decoder."""
        return int(self.self_attention_cache.length)

    @property
    def filled(self) -> list[Tensor]:
        """Keys and values of every layer, of the decoder's own tokens."""
        return list(self.self_attention_cache.filled)

    def see(self, num_new: int) -> tuple[Tensor, Tensor]:
        """See RunningCache; of the decoder."""
        seen: tuple[Tensor, Tensor] = self.self_attention_cache.see(num_new)
        return seen

    def see_encoded(self, num_new: int) -> Tensor:
        """Which of the encoder's columns each sequence sees, bool [B, columns]."""
        sees: Tensor = self.cross_attention_cache.see(num_new)[0]
        return sees

    def select(self, rows_B: Tensor, first_column: int) -> None:
        """Keep these sequences, in this order; no kept one's own tokens begin before."""
        self.self_attention_cache.select(rows_B, first_column)
        self.cross_attention_cache.select(rows_B, 0)

    def join(self, other: RunningEncodedCache) -> None:
        """Put another's sequences below these."""
        self.self_attention_cache.join(other.self_attention_cache)
        self.cross_attention_cache.join(other.cross_attention_cache)


def _grown(buffer: Tensor, states_BhTd: Tensor, length: int) -> Tensor:
    """The buffer's columns in one with room for `length` and some more."""
    held = 0 if buffer.ndim == 1 else buffer.shape[2]
    # A quarter more, or the copies of a long sequence would be quadratic in its length.
    shape = list(states_BhTd.shape)
    shape[2] = max(length, held + held // 4) + _SPARE_COLUMNS
    # Zeros: what a mask hides is multiplied by 0, and must not be a NaN.
    grown = states_BhTd.new_zeros(shape)
    if held:
        grown[:, :, :held] = buffer
    return grown


def _stacked(above: Tensor, below: Tensor, length: int) -> Tensor:
    """Two filled caches [B, h, ., d] on top of one another, their last columns at `length`."""
    shape = [above.shape[0] + below.shape[0], above.shape[1], length + _SPARE_COLUMNS]
    stacked = above.new_zeros([*shape, above.shape[3]])
    stacked[: above.shape[0], :, length - above.shape[2] : length] = above
    stacked[above.shape[0] :, :, length - below.shape[2] : length] = below
    return stacked
