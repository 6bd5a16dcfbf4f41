"""An engine whose log-probabilities have drifted from the learner's, mended while the run goes on.

The weights are sent anew once. An engine that still disagrees holds others, or computes wrongly: it
is lost, and replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from distill_system.data import RunData
from distill_system.driver.start_check import choose_by_length
from distill_system.errors import TransferError, WorkerLostError
from distill_system.rollout import RolloutPool, Sampling
from distill_system.run.context import RunContext
from distill_system.run.pools import Pools

LABEL = "drift_check"
"""Of the samples' names and seeds: no text of the run has them."""

PROMPTS_EACH, MAX_RESPONSE_TOKENS = 4, 16
"""Prompts of each engine, and tokens of a response."""


class EngineDrift:
    """Mends what a gap above rollout.max_logprob_gap shows.

    settle: returns once no publish is under way.
    """

    def __init__(
        self, context: RunContext, pools: Pools, data: RunData, settle: Callable[[], None]
    ) -> None:
        self._context = context
        self._pools = pools
        self._data = data
        self._settle = settle

    def mend(self, error: TransferError) -> None:
        """Send the weights anew, and lose the engines that disagree all the same.

        Raises: `error` where nothing replaces a worker; what a replacement fails with.
        """
        supervision = self._pools.weights.supervision
        if supervision is None:
            raise error
        self._context.view.note(f"{error}. The weights are sent anew")
        self._settle()
        self._pools.weights.break_up()
        self._pools.weights.publish(self._pools.weights.version)
        for name, gap in self._gaps():
            if not gap <= self._limit:  # a NaN is on neither side
                said = f"{name} disagrees with the learner under the same weights, sent anew"
                supervision.lose(WorkerLostError(f"{said}: mean {gap:.3g} nats", name))

    @property
    def _limit(self) -> float:
        limit = self._context.config.rollout.max_logprob_gap
        assert limit is not None, "without a limit no gap is an error"
        return limit

    def _gaps(self) -> Iterator[tuple[str, float]]:
        """Each student engine with its mean |engine - learner| over the tokens it writes, nats."""
        pools = {"student_rollout": self._pools.students}
        if self._pools.evaluation is not self._pools.students:
            pools["evaluation"] = self._pools.evaluation
        for name, pool in pools.items():
            yield from self._gaps_of(name, pool)

    def _gaps_of(self, name: str, pool: RolloutPool) -> list[tuple[str, float]]:
        config = self._context.config
        longest = min(MAX_RESPONSE_TOKENS, config.rollout.sampling.max_response_tokens)
        sampling = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=longest)
        prompts = choose_by_length(self._data.prompts, PROMPTS_EACH)
        found = []
        for worker in pool.workers.members:
            asked = pool.workers.start(
                worker, "generate", prompts, sampling, config.seed, f"{LABEL}_{worker}"
            )
            [written] = pool.workers.finish([asked], what="rollouts to compare")
            said = self._pools.learner.read_logprobs(written)
            gaps = [
                np.abs(trajectory.behaviour_logprobs.astype(np.float64) - logprobs)
                for trajectory, logprobs in zip(written, said, strict=True)
            ]
            found.append((f"{name}-{worker}", float(np.concatenate(gaps).mean())))
        return found
