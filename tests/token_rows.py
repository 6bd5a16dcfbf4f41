"""Response tokens as objectives read them, for tests that say what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill_system.objectives.rows import TokenRows


def make_token_rows(
    hidden_NH: Tensor, token_ids: Any, lengths: Sequence[int], **more: Any
) -> TokenRows:
    """Sequences of these lengths, one behind the other; this rank has all there are.

    more: other fields, in place of what follows from the lengths too.
    """
    fields = {
        "token_ids_N": torch.as_tensor(token_ids),
        "sequence_ids_N": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        "positions_N": torch.cat([torch.arange(length) for length in lengths]),
        "num_global_tokens": len(hidden_NH),
        "num_global_sequences": len(lengths),
    }
    return TokenRows(hidden_NH=hidden_NH, **{**fields, **more})
