"""Which prompts come next: a deterministic walk over shuffles, one per epoch.

In: the number of prompts and a seed.  Out: indices; the position is a few numbers that a
checkpoint keeps.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from distill_system.errors import DataError, RunStateError
from distill_system.seeds import derive_seed


class PromptFrontier:
    """Hands out prompt indices; each epoch holds every index once, in an order of its own.

    Args:
        num_prompts: indices run over [0, num_prompts).
        seed: the run's seed.
        purpose: what the walk is for; two purposes walk in unrelated orders.

    Raises:
        DataError: num_prompts is not positive.
    """

    def __init__(self, num_prompts: int, seed: int, purpose: str) -> None:
        if num_prompts < 1:
            raise DataError(f"{purpose}: expected at least one prompt to draw, got {num_prompts}")
        self._num_prompts = num_prompts
        self._seed = seed
        self._purpose = purpose
        self._epoch = 0
        self._position = 0
        self._order = self._shuffle(0)

    def take(self, count: int) -> list[int]:
        """The next count indices; they may cross into the next epoch."""
        taken: list[int] = []
        while len(taken) < count:
            if self._position == self._num_prompts:
                self._move_to(self._epoch + 1, 0)
            end = min(self._num_prompts, self._position + count - len(taken))
            taken.extend(self._order[self._position : end].tolist())
            self._position = end
        return taken

    def state(self) -> dict[str, int]:
        """The position, as JSON can keep it."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "num_prompts": self._num_prompts,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from a position that `state` returned.

        Raises:
            RunStateError: the position belongs to another number of prompts.
        """
        if state["num_prompts"] != self._num_prompts:
            raise RunStateError(
                f"{self._purpose}: the checkpoint walks over {state['num_prompts']} prompts, the "
                f"data now holds {self._num_prompts}; resume with the data the run began with"
            )
        self._move_to(state["epoch"], state["position"])

    def _move_to(self, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        self._order = self._shuffle(epoch)

    def _shuffle(self, epoch: int) -> npt.NDArray[np.int64]:
        generator = np.random.default_rng(derive_seed(self._seed, self._purpose, epoch))
        return generator.permutation(self._num_prompts)
