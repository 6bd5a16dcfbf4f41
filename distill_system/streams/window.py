"""Bounded staleness: which prompts may be given out, and what is too old to learn from.

Step k learns under weight version k and makes version k + 1. It learns from a batch of B
trajectories; at most S + 1 batches are given out and not yet learned from. docs/concepts.md proves
that no trajectory is then more than S versions older than the student that learns from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

TooOld = Literal["wait", "reissue", "weigh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StalenessWindow:
    """The rule alone; what is in flight stands in the buffer (in_flight.py).

    batch_size: B.  max_staleness: S.  first_step, end_step: feeds steps first .. end - 1.
    too_old: "wait" promises each trajectory to a step as its prompt is given out, so that every
        step learns from its own prompts. "reissue" and "weigh" fill batches in the order of
        finishing; what would be older than S is given out again, promised to a step this time, or
        taken as it is.
    min_share: a step may begin with this share of its batch, unless it waits for a promise.
    """

    batch_size: int
    max_staleness: int
    first_step: int
    end_step: int
    too_old: TooOld = "wait"
    min_share: float = 1.0

    @property
    def fewest(self) -> int:
        """Trajectories that a step needs to begin."""
        return math.ceil(self.batch_size * self.min_share)

    @property
    def in_order(self) -> bool:
        """Whether every step learns from the prompts that were given out for it."""
        return self.too_old == "wait"

    def step_to_give(self, next_step: int, num_in_flight: int) -> int:
        """The step that learns from the next prompt, if steps learn in the order of giving out."""
        return next_step + num_in_flight // self.batch_size

    def may_give(self, step: int, version: int) -> bool:
        """Whether a writer that holds this version may be given a prompt for this step."""
        return step <= version + self.max_staleness and step < self.end_step

    def needs_version(self, step: int) -> int:
        """The oldest version that may write what is given out for this step."""
        return step - self.max_staleness

    def is_too_old(self, step: int, oldest_version: int) -> bool:
        """Whether a step must not learn from text of this version, unless it is weighed."""
        return step - oldest_version > self.max_staleness

    def last_step_in_time(self, version: int) -> int:
        """The last step that may learn from what a writer of this version writes now."""
        return min(version + self.max_staleness, self.end_step - 1)
