"""One weight version on its way, as the driver sees it: packed by ranks, received by workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from distill_system.records import WeightVersion
from distill_system.workers import Reference, Workers

ANSWER_SECONDS = 15.0
"""Workers have so long to say that a transfer has failed, once its own deadline is over."""


class Publishing:
    """From the first rank that gathers to the last rollout worker that answers.

    packing: of each rank's start_publish. Rank 0's result are references to the rollout workers'
    own calls, so that whoever waits for these needs no rank that is busy with the next step.
    """

    def __init__(self, version: int, packing: Sequence[Reference]) -> None:
        self.version = version
        self._packing = packing
        self._began = time.perf_counter()
        self._receiving: list[Reference] | None = None

    def receiving(self, ranks: Workers, seconds: float) -> list[Reference]:
        """The rollout workers' calls; waits for the packing."""
        if self._receiving is None:
            what = f"the learner to gather weight version {self.version}"
            self._receiving = ranks.finish(self._packing, what=what, seconds=seconds)[0]
        return self._receiving

    def finish(self, ranks: Workers, seconds: float) -> WeightVersion:
        """Wait for every rollout worker."""
        receiving = self.receiving(ranks, seconds)
        # The packing has used up a part of the same deadline.
        left = max(0.0, seconds - (time.perf_counter() - self._began)) + ANSWER_SECONDS
        what = f"weight version {self.version} to reach the rollout workers"
        first, *_ = ranks.finish(receiving, what=what, seconds=left)
        assert isinstance(first, WeightVersion)
        return replace(first, seconds=time.perf_counter() - self._began)
