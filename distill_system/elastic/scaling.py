"""When a pool should grow or shrink: measured idle shares in, one worker more or less out.

Pure: no clock, no workers. With bounds, patience and a cool-down it does what a person would who
watches the pools: help the one that the learner waits for, else send home who is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mode

from distill_system.config.pools import PoolConfig, ScalingConfig
from distill_system.records import PoolActivity


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was measured over one stretch of the run.

    at_seconds: the stretch's end, on a clock that only goes forward.
    pools: activity of every pool that may change, by name.
    learner_starved_share: of its time that the learner had nothing to learn from, 0..1.
    waited_for: the pool that the learner waited for longest; None if it did not wait.
    """

    at_seconds: float
    pools: Mapping[str, PoolActivity]
    learner_starved_share: float
    waited_for: str | None = None


@dataclass(frozen=True, slots=True)
class _Change:
    """One worker more (+1) or less (-1) of a pool."""

    pool: str
    by: int


class AutoScaler:
    """Decides from look to look; remembers what the looks before have said.

    A pool grows if the learner waits for it longer than starved_share, though not over its
    max_count. Where nothing can grow, the pool shrinks whose workers wait most for what comes
    after them, then the one that is idlest, if those who stay are still idle for spare_share: a
    pool that has shrunk does not starve the learner, which is what keeps it from swinging.
    """

    def __init__(self, config: ScalingConfig, pools: Mapping[str, PoolConfig]) -> None:
        """pools: those that may change, with their bounds."""
        self._config = config
        self._pools = dict(pools)
        self._agreeing: list[_Change] = []
        self._quiet_until = float("-inf")

    def decide(self, look: Look, present: Mapping[str, int]) -> dict[str, int]:
        """The pool to change with its new number of workers; empty if nothing is to change.

        present: workers of each pool as they are now. Ask only when none is coming or going.
        """
        if look.at_seconds < self._quiet_until:
            return {}
        change = self._propose(look, present)
        if change is None or any(earlier.by != change.by for earlier in self._agreeing):
            self._agreeing = []
        if change is not None:
            self._agreeing.append(change)
        if len(self._agreeing) < self._config.patience:
            return {}
        # Of two pools that are nearly as slow, or as idle, each look may name the other.
        change = mode(self._agreeing)
        self.rest(look.at_seconds)
        return {change.pool: present[change.pool] + change.by}

    def rest(self, at_seconds: float) -> None:
        """Something changed, by whomever: wait until its effect shows, and forget what was seen."""
        self._quiet_until = at_seconds + self._config.cool_down_seconds
        self._agreeing = []

    def _propose(self, look: Look, present: Mapping[str, int]) -> _Change | None:
        is_starved = look.learner_starved_share > self._config.starved_share
        needed = look.waited_for if is_starved else None
        if needed in self._pools and present[needed] < self._pools[needed].most:
            return _Change(needed, +1)
        spare = [
            (activity.blocked_share, activity.starved_share, name)
            for name, activity in look.pools.items()
            if name != needed and self._is_spare(name, activity, present[name])
        ]
        return _Change(max(spare)[-1], -1) if spare else None

    def _is_spare(self, name: str, activity: PoolActivity, workers: int) -> bool:
        """Whether one worker less would leave the others idle for long enough."""
        if name not in self._pools or workers <= max(1, self._pools[name].fewest):
            return False
        used = 1.0 - activity.starved_share - activity.blocked_share
        return used * workers / (workers - 1) <= 1.0 - self._config.spare_share
