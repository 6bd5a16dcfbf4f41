"""A rank's random states: torch's generators of this process, taken and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distill_system.seeds import derive_seed


def random_state() -> dict[str, Tensor]:
    """States of torch's CPU generator and, where there is one, of the current CUDA device's.

    Returns: "cpu" and perhaps "cuda" -> uint8, on the CPU.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(states: Mapping[str, Tensor], *, new_rank: int | None) -> None:
    """Go on from states that random_state returned.

    new_rank: for a rank that was not there when they were taken: states is then another rank's, and
    this one begins a stream of its own that follows from it. None goes on with them as they are.
    """
    if new_rank is not None:
        other = torch.Generator()
        other.set_state(states["cpu"])
        drawn = int(torch.randint(2**31, (), generator=other))
        torch.manual_seed(derive_seed(drawn, "learner_rank", new_rank))  # of every device
        return
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
