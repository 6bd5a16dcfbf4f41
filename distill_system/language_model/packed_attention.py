"""Causal attention inside each sequence of a packed line, for every family transformers knows.

A packed line is one row of tokens in which sequences stand one after another, with no padding.
All layers but attention treat its tokens alike; attention is told by a PackedLayout where the
sequences end. The layout travels as a keyword of the model's forward, down to the attention of
every block, so that a block which is run again (activation checkpointing) sees the same layout.

A model whose attention cannot be told, or whose attention does what this one does not, is loaded
with the library's own, and its lines are read as one padded rectangle.

Axes: T tokens of the line, B sequences of a group, L its longest, M = B x L, h heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distill_system.errors import ModelError
from distill_system.language_model.families import is_read_packed, logit_scale

PACKED_ATTENTION = "packed"
"""The attn_implementation under which transformers finds packed_attention."""

MIN_GROUP_TOKENS, MAX_STRETCH = 1024, 1.25
"""Fewest tokens of a group that ends for its padding, and how much longer its longest may be."""

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""What some families ask of attention and this one does not give."""


@dataclass(frozen=True, slots=True)
class PaddedGroup:
    """Neighbours in the line, of similar length, laid out as a rectangle for attention alone.

    num_tokens: of all its sequences. num_sequences: B. fill_M: the token of the group that each
    slot of the rectangle takes, int64 (slots behind a sequence's end repeat its last token).
    slots_n: where each token of the group stands, int64. Both None if all lengths are equal.
    """

    num_tokens: int
    num_sequences: int
    fill_M: Tensor | None
    slots_n: Tensor | None

    def pad(self, rows_nhd: Tensor) -> Tensor:
        """The group's tokens as a rectangle, [B, h, L, d]."""
        rows = rows_nhd if self.fill_M is None else rows_nhd.index_select(0, self.fill_M)
        return rows.unflatten(0, (self.num_sequences, -1)).transpose(1, 2)

    def unpad(self, rows_BhLd: Tensor) -> Tensor:
        """The rectangle's tokens, one after another, [n, h, d]."""
        rows = rows_BhLd.transpose(1, 2).flatten(0, 1)
        return rows if self.slots_n is None else rows.index_select(0, self.slots_n)


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the sequences of one packed line begin and end; made once, read by every block.

    position_ids_1T: place of each token in its own sequence, int64. boundaries: 0 and the end of
    every sequence, int32 [sequences + 1]. longest: tokens of the longest sequence. groups: the
    line cut into rectangles, for devices and precisions without a kernel for packed lines.
    lengths: of the sequences, in the line's order.
    """

    position_ids_1T: Tensor
    boundaries: Tensor
    longest: int
    groups: tuple[PaddedGroup, ...]
    lengths: tuple[int, ...]

    @classmethod
    def build(cls, lengths: Sequence[int], device: torch.device) -> PackedLayout:
        """The layout of sequences of these lengths (each at least 1), in ascending order."""
        sizes = np.array(lengths, dtype=np.int64)
        assert (np.diff(sizes, prepend=1) >= 0).all(), "lengths ascend, from 1 up"
        ends = np.cumsum(sizes)
        positions = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
        return cls(
            torch.from_numpy(positions)[None].to(device, non_blocking=True),
            torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(
                device, non_blocking=True
            ),
            int(sizes[-1]),
            tuple(_build_group(group, device) for group in group_by_length(sizes)),
            tuple(sizes.tolist()),
        )

    def rectangle(self) -> PaddedGroup:
        """All sequences of the line side by side."""
        sizes = np.array(self.lengths, dtype=np.int64)
        return _build_group(sizes, self.position_ids_1T.device)


def choose_attention(config: Any) -> str:
    """The attn_implementation to load a model with: packed, or else the one written out in full.

    Not the library's fused ones: they leave out what they do not know, soft caps among it.
    """
    if config.is_encoder_decoder:  # listed families alone, which ask for nothing else
        return "sdpa"
    return PACKED_ATTENTION if is_read_packed(config) else "eager"


def group_by_length(lengths: np.ndarray) -> list[np.ndarray]:
    """Ascending lengths, cut into groups of similar ones.

    A group of at least MIN_GROUP_TOKENS ends where the next sequence is more than MAX_STRETCH
    times as long as its first; a group never holds twice the slots that it has tokens.
    """
    cuts, first, tokens = [], 0, 0
    for index, length in enumerate(lengths):
        padded = length * (index - first + 1)
        stretched = tokens >= MIN_GROUP_TOKENS and length > MAX_STRETCH * lengths[first]
        if tokens and (stretched or padded > 2 * (tokens + length)):
            cuts.append(index)
            first, tokens = index, 0
        tokens += int(length)
    return np.split(lengths, cuts)


def _build_group(lengths: np.ndarray, device: torch.device) -> PaddedGroup:
    num_tokens, longest = int(lengths.sum()), int(lengths[-1])
    if num_tokens == longest * len(lengths):
        return PaddedGroup(num_tokens, len(lengths), None, None)
    firsts, columns = np.cumsum(lengths) - lengths, np.arange(longest)
    fill_BL = firsts[:, None] + np.minimum(columns, lengths[:, None] - 1)
    slots_n = np.flatnonzero(columns < lengths[:, None])
    arrays = (fill_BL.ravel(), slots_n)
    places = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
    return PaddedGroup(num_tokens, len(lengths), *places)


def read_line(model: Any, input_ids_1T: Tensor, layout: PackedLayout) -> Tensor:
    """What the unembedding multiplies at every token of a packed line, [T, H].

    The final hidden state, times the factor that the family's logits have after the product. The
    model's vocabulary is not multiplied by.
    """
    packs = model.config._attn_implementation == PACKED_ATTENTION
    hidden_TH = (_read_packed if packs else _read_padded)(model, input_ids_1T, layout)
    scale = logit_scale(model.config)
    return hidden_TH if scale == 1.0 else hidden_TH * scale


def _read_packed(model: Any, input_ids_1T: Tensor, layout: PackedLayout) -> Tensor:
    # A mask of four axes is passed on as it is: the library then makes none of T x T. It has no
    # entries, so attention that is not told of the layout cannot read it by mistake.
    no_mask = input_ids_1T.new_empty((1, 1, 0, 0), dtype=torch.bool)
    output = model.base_model(
        input_ids=input_ids_1T,
        position_ids=layout.position_ids_1T,
        attention_mask=no_mask,
        packed_layout=layout,
        use_cache=False,
    )
    return output.last_hidden_state[0]


def _read_padded(model: Any, input_ids_1T: Tensor, layout: PackedLayout) -> Tensor:
    """The library's own forward over one rectangle.

    One, whatever it wastes: ranks that share a model must run it equally often. What fills a line
    up stands behind its sequence, where a model that reads from left to right does not look, so no
    mask is needed; its rows are not read.
    """
    rectangle = layout.rectangle()
    ids_T = input_ids_1T[0]
    if rectangle.fill_M is not None:
        ids_T = ids_T.index_select(0, rectangle.fill_M)
    ids_BL = ids_T.unflatten(0, (rectangle.num_sequences, -1))
    rows_MH = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state.flatten(0, 1)
    return rows_MH if rectangle.slots_n is None else rows_MH.index_select(0, rectangle.slots_n)


def packed_attention(
    module: torch.nn.Module,
    query_1hTd: Tensor,
    key_1hTd: Tensor,
    value_1hTd: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; returns [1, T, h, d] and no attention weights.

    Without a layout: the library's own scaled dot product attention (generation, padded batches).
    Raises: ModelError if the model asks for what packed attention does not do.
    """
    if packed_layout is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise ModelError(
                f"{type(module).__name__}: expected the packed layout among the keywords of "
                "attention, got none. This family of models does not pass its keywords on and "
                "cannot be read packed"
            )
        return sdpa_attention_forward(
            module,
            query_1hTd,
            key_1hTd,
            value_1hTd,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    _require_plain(module, dropout, kwargs)
    dtype = _compute_dtype(value_1hTd)
    query_Thd, key_Thd, value_Thd = (
        states[0].transpose(0, 1).to(dtype) for states in (query_1hTd, key_1hTd, value_1hTd)
    )
    if sliding_window is not None and sliding_window >= packed_layout.longest:
        sliding_window = None
    attend = _attend_varlen if _has_varlen_kernel(query_Thd) else _attend_in_groups
    output_Thd = attend(query_Thd, key_Thd, value_Thd, packed_layout, scaling, sliding_window)
    return output_Thd[None], None


def _attend_varlen(
    query_Thd: Tensor,
    key_Thd: Tensor,
    value_Thd: Tensor,
    layout: PackedLayout,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """torch's own attention over packed lines (flash attention on CUDA), [T, h, d]."""
    # The kernel counts the tokens to the left; the families' window counts the token itself too.
    left = -1 if sliding_window is None else sliding_window - 1
    output_Thd = varlen_attn(
        query_Thd,
        key_Thd,
        value_Thd,
        layout.boundaries,
        layout.boundaries,
        layout.longest,
        layout.longest,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=True,
    )
    assert isinstance(output_Thd, Tensor), "a tuple comes only where more than the output is asked"
    return output_Thd


def _attend_in_groups(
    query_Thd: Tensor,
    key_Thd: Tensor,
    value_Thd: Tensor,
    layout: PackedLayout,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """One rectangle of similar lengths after another, [T, h, d].

    Padding stands behind each sequence, so a causal mask hides it; its rows are not read, and so
    carry no gradient back.
    """
    sizes = [group.num_tokens for group in layout.groups]
    lines = (line.split(sizes) for line in (query_Thd, key_Thd, value_Thd))
    outputs = []
    for group, *line in zip(layout.groups, *lines, strict=True):
        query, key, value = (group.pad(rows_nhd) for rows_nhd in line)
        if query.is_cuda:
            key, value = (_repeat_heads(states, query.shape[1]) for states in (key, value))
        band_LL = _window_mask(query, sliding_window)
        output_BhLd = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=band_LL,
            is_causal=band_LL is None,
            scale=scaling,
            enable_gqa=True,
        )
        outputs.append(group.unpad(output_BhLd))
    return torch.cat(outputs)


def _repeat_heads(states_BgLd: Tensor, heads: int) -> Tensor:
    """Key or value heads as many as the query's, each repeated for its group, [B, h, L, d].

    torch's kernels for float32 on CUDA take no groups: without this all L x L scores are made.
    """
    return states_BgLd.repeat_interleave(heads // states_BgLd.shape[1], dim=1)


def _window_mask(query_BhLd: Tensor, sliding_window: int | None) -> Tensor | None:
    """True where a token looks: itself and the sliding_window - 1 before it; bool [L, L]."""
    length = query_BhLd.shape[2]
    if sliding_window is None or sliding_window >= length:
        return None
    ones_LL = torch.ones(length, length, dtype=torch.bool, device=query_BhLd.device)
    return ones_LL.tril().triu(1 - sliding_window)


def _has_varlen_kernel(query_Thd: Tensor) -> bool:
    """Flash attention: CUDA from Ampere on, half precision, heads of 8, 16, ... 256 components."""
    half = query_Thd.dtype in (torch.bfloat16, torch.float16)
    head_size = query_Thd.shape[-1]
    if not (query_Thd.is_cuda and half and head_size % 8 == 0 and head_size <= 256):
        return False
    return torch.cuda.get_device_capability(query_Thd.device) >= (8, 0)


def _compute_dtype(value: Tensor) -> torch.dtype:
    """Autocast's, where it is on: rotary embeddings may have left queries and keys in float32."""
    device_type = value.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return value.dtype


def _require_plain(module: torch.nn.Module, dropout: float, keywords: dict[str, Any]) -> None:
    asked = [name for name in UNSUPPORTED if keywords.get(name) is not None]
    if dropout:
        asked.append(f"dropout={dropout}")
    if asked:
        raise ModelError(
            f"{type(module).__name__}: expected plain causal attention, got {', '.join(asked)}. "
            "Packed attention has none of these; dropout is off in evaluation mode (model.eval())"
        )


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
