"""Decides when a pool grows or shrinks: measured idle shares in, one worker more or less out.

Where all pools share a number of GPUs, a worker that is added is paid for by those that go.

Pure: it reads no clock and calls no worker. A decision needs `patience` observations in a row that
agree; after every change nothing is decided for `cool_down_seconds`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mode

from distill_system.config.pools import PoolConfig, ScalingConfig
from distill_system.records import PoolActivity


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingObservation:
    """What was measured between two decisions.

    at_seconds: end of the measured interval, on a monotonic clock.
    pools: activity of every pool that may change, by name.
    learner_starved_share: share of the interval in which the learner had no batch, 0..1.
    waited_for: the pool that the learner waited for longest; None if it did not wait.
    """

    at_seconds: float
    pools: Mapping[str, PoolActivity]
    learner_starved_share: float
    waited_for: str | None = None


@dataclass(frozen=True, slots=True)
class _Change:
    """One worker more (+1) or less (-1) of a pool.

    donor: the pool that gives up its GPUs for the worker, and how many workers with them.
    """

    pool: str
    by: int
    donor: tuple[str, int] | None = None


class AutoScaler:
    """Proposes a change for each observation, and makes it once enough proposals in a row agree.

    Growing comes first: a pool grows, up to its max_count, if the learner waits for it for more
    than starved_share of the time. If none can grow, a pool may shrink: the one whose workers are
    blocked most (they wait for room after them), among equals the one that is starved most. It
    shrinks only if the workers that stay would still be idle for spare_share of their time. So a
    pool that has shrunk does not starve the learner, and sizes do not swing up and down.

    With a budget (total_gpus, total_cpus) the busiest pool grows, by what another gives up where
    there is no room: the pool that would have most spare time afterwards, if it is spare_share at
    least. Nothing is given up for nothing. A worker that moved would have to be missed by more than
    that to move back, so it stays; with workers of equal size the throughput ends within
    spare_share of the best split.
    """

    def __init__(
        self,
        config: ScalingConfig,
        pools: Mapping[str, PoolConfig],
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """pools: those that may change, with their bounds.  ranks: of one worker, where several."""
        self._config = config
        self._pools = dict(pools)
        self._ranks = dict(ranks or {})
        self._agreeing: list[_Change] = []
        self._cool_until = float("-inf")

    def decide(self, observation: ScalingObservation, present: Mapping[str, int]) -> dict[str, int]:
        """The pool to change with its new number of workers; empty if nothing is to change.

        present: workers of each pool now. Call it only while no worker is starting or leaving.
        """
        if observation.at_seconds < self._cool_until:
            return {}
        change = self._propose(observation, present)
        # Proposals agree if all grow or all shrink, whichever pool they name.
        if change is None or any(earlier.by != change.by for earlier in self._agreeing):
            self._agreeing = []
        if change is not None:
            self._agreeing.append(change)
        if len(self._agreeing) < self._config.patience:
            return {}
        # Two pools that are about equally slow, or idle, may be named in turn: take the commoner.
        change = mode(self._agreeing)
        self.start_cool_down(observation.at_seconds)
        changed = {change.pool: present[change.pool] + change.by}
        if change.donor is not None:
            donor, count = change.donor
            changed[donor] = present[donor] - count
        return changed

    def start_cool_down(self, at_seconds: float) -> None:
        """Decide nothing until the effect of a change at this time shows; drop old observations.

        Call it for every change of a pool: by request, by this class, or by a worker that failed.
        """
        self._cool_until = at_seconds + self._config.cool_down_seconds
        self._agreeing = []

    def _propose(
        self, observation: ScalingObservation, present: Mapping[str, int]
    ) -> _Change | None:
        is_starved = observation.learner_starved_share > self._config.starved_share
        needed = self._find_slowest(observation) if is_starved else None
        if needed in self._pools and present[needed] < self._pools[needed].most:
            return self._grow(needed, observation, present)
        if self._config.budget is not None:
            return None
        spare = [
            (activity.blocked_share, activity.starved_share, name)
            for name, activity in observation.pools.items()
            if name != needed and self._is_spare(name, activity, present[name])
        ]
        return _Change(max(spare)[-1], -1) if spare else None

    def _find_slowest(self, observation: ScalingObservation) -> str | None:
        """The pool that is to grow. Where a batch waits for two pools the learner names the first,
        which costs a worker too many; what another pool has to give goes to the busiest."""
        if self._config.budget is None:
            return observation.waited_for
        pools = observation.pools
        return max(pools, key=lambda name: _used(pools[name]), default=None)

    def _grow(
        self, needed: str, observation: ScalingObservation, present: Mapping[str, int]
    ) -> _Change | None:
        """One worker more, paid for where the budget has no room; None if nobody can pay."""
        missing = self.over_budget({**present, needed: present[needed] + 1})
        if missing <= 0.0:
            return _Change(needed, +1)
        donors = []
        for name, activity in observation.pools.items():
            if name == needed or name not in self._pools or not self._size(name):
                continue
            count = math.ceil(missing / self._size(name) - 1e-9)
            if self._is_spare(name, activity, present[name], count):
                donors.append((_used_without(activity, present[name], count), name, count))
        return _Change(needed, +1, donor=min(donors)[1:]) if donors else None

    def over_budget(self, counts: Mapping[str, int]) -> float:
        """How far so many workers are above the budget; none is above no budget."""
        if self._config.budget is None:
            return 0.0
        held = sum(counts[name] * self._size(name) for name in self._pools if name in counts)
        over = held - self._config.budget[1]
        return over if over > 1e-6 else 0.0

    def _size(self, name: str) -> float:
        """What one worker holds of what the budget counts."""
        assert self._config.budget is not None, "nobody asks otherwise"
        pool = self._pools[name]
        each = float(getattr(pool, self._config.budget[0])) if pool.is_elastic else 0.0
        return self._ranks.get(name, 1) * each

    def _is_spare(self, name: str, activity: PoolActivity, workers: int, count: int = 1) -> bool:
        """Whether the workers that stay would be idle for spare_share with so many workers less."""
        if name not in self._pools or workers - count < max(1, self._pools[name].fewest):
            return False
        return _used_without(activity, workers, count) <= 1.0 - self._config.spare_share


def _used(activity: PoolActivity) -> float:
    return 1.0 - activity.starved_share - activity.blocked_share


def _used_without(activity: PoolActivity, workers: int, count: int) -> float:
    """Busy share of those that stay; the same work on fewer workers."""
    return _used(activity) * workers / (workers - count)
