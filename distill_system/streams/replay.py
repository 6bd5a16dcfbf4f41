"""DistiLLM's adaptive schedule: which stream a step learns from, and student text used again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np

from distill_system.config.distill import ReplayConfig
from distill_system.records import Trajectory, trajectory_from_plain, trajectory_to_plain
from distill_system.seeds import derive_seed


class StepKind(Enum):
    """What a step learns from."""

    DATA = "rows of data"
    WRITE = "text the student writes now"
    REPLAY = "text the student wrote earlier"


class AdaptiveReplay:
    """Source: Ko et al. 2024, arXiv 2402.03898, section 3.2 and the authors' public code.

    A step draws r uniformly. r < share (1 - t/T), or r < share while the buffer is not full: the
    student writes. Otherwise r < share: the buffer is sampled. Otherwise: rows of data. The share
    grows by `increase` when the held-out loss has risen by more than `tolerance`. Differs: the
    held-out loss is measured on the teacher's text, which the run has already.
    """

    def __init__(self, config: ReplayConfig, *, seed: int, total_steps: int) -> None:
        self.config = config
        self.seed = seed
        self.total_steps = total_steps
        self.share = config.initial_share
        self.last_loss: float | None = None
        self.buffer: deque[Trajectory] = deque(maxlen=config.capacity)

    def choose(self, step: int) -> StepKind:
        """What this step learns from; the same for the same step, share and buffer."""
        drawn = self._random(step, "choice").random()
        left = 1.0 - step / self.total_steps
        full = len(self.buffer) == self.config.capacity
        if drawn < self.share * left or (drawn < self.share and not full):
            return StepKind.WRITE
        return StepKind.REPLAY if drawn < self.share else StepKind.DATA

    def keep(self, written: Sequence[Trajectory]) -> None:
        """Remember what the student wrote."""
        self.buffer.extend(written)

    def sample(self, step: int, count: int) -> list[Trajectory]:
        """Earlier text, without repetition as far as there is enough of it."""
        count = min(count, len(self.buffer))
        chosen = self._random(step, "sample").choice(len(self.buffer), size=count, replace=False)
        return [self.buffer[index] for index in chosen]

    def on_held_out_loss(self, held_out_loss: float) -> None:
        """Raise the share if the loss has risen since it was last measured."""
        if self.last_loss is not None and held_out_loss > self.last_loss + self.config.tolerance:
            self.share = min(1.0, self.share + self.config.increase)
        self.last_loss = held_out_loss

    def state(self) -> dict[str, Any]:
        """Everything that the next choice and the next sample depend on."""
        return {
            "share": self.share,
            "last_loss": self.last_loss,
            "buffer": [trajectory_to_plain(trajectory) for trajectory in self.buffer],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.share, self.last_loss = state["share"], state["last_loss"]
        self.buffer.clear()
        self.buffer.extend(trajectory_from_plain(plain) for plain in state["buffer"])

    def _random(self, step: int, purpose: str) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.seed, "replay", purpose, step))
