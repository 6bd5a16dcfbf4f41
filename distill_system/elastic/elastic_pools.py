"""Pools that change while a run goes on: who is wanted, who is on the way, who comes in and leaves.

The driver asks `go_on` between steps, and `adopt` where a weight version is about to be published:
a worker that has joined then gets the newest weights with all others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import islice
from types import TracebackType
from typing import Any, Protocol, Self

from distill_system.cluster import ElasticPool, WorkerRequest
from distill_system.config.pools import ScalingConfig
from distill_system.elastic.scale_requests import PoolStatus, ScaleRequests, ScaleStatus
from distill_system.elastic.scaling import AutoScaler, Look
from distill_system.errors import DistillError
from distill_system.workers import StartedWorker

RECEIVES_WEIGHTS = "student_rollout"
REMEMBERED_ANSWERS = 50


class Starting(Protocol):
    """A worker that starts in the background; see cluster.StartingWorker."""

    @property
    def name(self) -> str:
        """For messages."""

    def poll(self) -> StartedWorker | None:
        """The worker once it is ready.  Raises: DistillError if it is given up."""

    def cancel(self) -> None:
        """End the start."""


class Starts(Protocol):
    """What starts workers; see cluster.ClusterSession."""

    def begin_worker(
        self, request: WorkerRequest, worker_id: int, arguments: Mapping[str, Any]
    ) -> Any:  # a Starting
        """Begin to place and load a worker."""

    def adopt_worker(self, workers: Any, starting: Any) -> None:
        """Take a ready worker into its group."""


Release = Callable[[str, int], bool]
"""release(pool, worker_id): give this worker nothing more, and take back what it has; True once
nothing of it is under way there, False to be asked again."""


class ElasticPools:
    """Brings pools to the sizes that a person or the automatic mode asks for.

    A worker that cannot be placed or loaded is told of and given up; the run goes on without it.
    Use as a context: requests are read for its length, and what still starts at its end is ended.
    """

    def __init__(
        self,
        pools: Mapping[str, ElasticPool],
        session: Starts,
        scaling: ScalingConfig,
        requests: ScaleRequests,
        *,
        release: Release,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pools = dict(pools)
        self._session = session
        self._scaling = scaling
        self._requests = requests
        self._release = release
        self._say = say
        self._clock = clock
        self._scaler = AutoScaler(scaling, {name: pool.config for name, pool in pools.items()})
        self._looked_at = clock()
        self._wanted = {name: pool.workers.count for name, pool in pools.items()}
        self._starting: dict[str, list[Starting]] = {name: [] for name in pools}
        # Worker ids; True once nothing is under way there.
        self._leaving: dict[str, dict[int, bool]] = {name: {} for name in pools}
        self._since: dict[str, float | None] = dict.fromkeys(pools)
        self._problems = dict.fromkeys(pools, "")
        self._answers: dict[str, str] = {}
        self._told: ScaleStatus | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._open.enter_context(self._requests.listening())
        self._tell()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for name in self._pools:
            for starting in self._starting[name]:
                starting.cancel()
            self._starting[name] = []
        self._open.close()

    def go_on(self, measure: Callable[[], Look] | None = None) -> None:
        """One round, without waiting: requests, the automatic mode, workers on their way.

        measure: what the automatic mode looks at, of the time since it was last called; called
        only when a look is due. None, where there is nothing to measure, leaves it out.
        """
        for request in self._requests.read_new():
            problem = request.problem or "; ".join(self._refusals(request.wanted))
            self._answers[request.request_id] = problem
            if problem:
                self._say(f"scale request refused: {problem}")
            else:
                self._want(request.wanted, "by request")
        self._look(measure)
        for name in self._pools:
            self._steer(name)
            self._poll(name)
            self._drain(name)
        self._tell()

    def has_changes(self) -> bool:
        """Whether a worker is ready to join, or one that leaves has nothing left under way."""
        drained = any(any(leaving.values()) for leaving in self._leaving.values())
        return drained or any(self._poll(name) for name in self._pools)

    def adopt(self) -> bool:
        """Let ready workers join and drained ones leave; whether the weight-transfer group changed.

        Call it when no publish is under way; where it returns True, open the group anew before
        the next publish, and give a new student worker work only after it.
        """
        changed = False
        for name, pool in self._pools.items():
            ready = self._poll(name)
            self._drain(name)
            for starting in ready:
                self._session.adopt_worker(pool.workers, starting)
                self._starting[name].remove(starting)
            gone = [worker_id for worker_id, drained in self._leaving[name].items() if drained]
            for worker_id in gone:
                pool.workers.remove(worker_id)
                del self._leaving[name][worker_id]
            if ready or gone:
                self._say(f"{name} has {pool.workers.count} workers now")
                self._scaler.rest(self._clock())
                changed |= name == RECEIVES_WEIGHTS
        self._tell()
        return changed

    def _refusals(self, wanted: Mapping[str, int]) -> list[str]:
        said = []
        for name, count in wanted.items():
            if name not in self._pools:
                said.append(f"{name} cannot change; pools that can: {', '.join(self._pools)}")
            elif not self._pools[name].config.fewest <= count <= self._pools[name].config.most:
                bounds = self._pools[name].config
                said.append(
                    f"{name}={count} is out of its bounds: expected {bounds.fewest} to "
                    f"{bounds.most} (pools.{name}.min_count, max_count)"
                )
        return said

    def _want(self, wanted: Mapping[str, int], why: str) -> None:
        for name, count in wanted.items():
            if count != self._wanted[name]:
                self._say(f"{name}: {self._wanted[name]} -> {count} workers {why}")
            self._wanted[name], self._problems[name] = count, ""
            self._since[name] = time.time()
        self._scaler.rest(self._clock())

    def _look(self, measure: Callable[[], Look] | None) -> None:
        now = self._clock()
        is_due = now - self._looked_at >= self._scaling.look_every_seconds
        if measure is None or not self._scaling.automatic or not is_due:
            return
        self._looked_at = now
        look = measure()
        if all(self._status(name).is_settled for name in self._pools):
            present = {name: pool.workers.count for name, pool in self._pools.items()}
            change = self._scaler.decide(look, present)
            if change:
                self._want(change, _reason(look, change, present))

    def _steer(self, name: str) -> None:
        """Begin as many workers as are missing; let as many go as are too many."""
        pool, starting, leaving = self._pools[name], self._starting[name], self._leaving[name]
        missing = self._wanted[name] - self._settled_count(name)
        for _ in range(missing):
            worker_id = pool.workers.take_id()
            arguments = pool.arguments(worker_id)
            starting.append(self._session.begin_worker(pool.request, worker_id, arguments))
        for _ in range(min(-missing, len(starting))):
            starting.pop().cancel()
        surplus = max(0, self._settled_count(name) - self._wanted[name])
        staying = (worker for worker in reversed(pool.workers.members) if worker not in leaving)
        leaving.update(dict.fromkeys(islice(staying, surplus), False))

    def _settled_count(self, name: str) -> int:
        """Workers once all have come and gone that are on their way."""
        staying = self._pools[name].workers.count - len(self._leaving[name])
        return staying + len(self._starting[name])

    def _poll(self, name: str) -> list[Starting]:
        """Move every start on and give up those that failed; those that are ready."""
        ready = []
        for starting in list(self._starting[name]):
            try:
                if starting.poll() is not None:
                    ready.append(starting)
            except DistillError as error:
                self._starting[name].remove(starting)
                self._wanted[name] -= 1
                self._problems[name] = f"{starting.name} is given up: {error}"
                self._say(f"{self._problems[name]}. The run goes on without it")
                self._scaler.rest(self._clock())
        return ready

    def _drain(self, name: str) -> None:
        for worker_id, drained in self._leaving[name].items():
            self._leaving[name][worker_id] = drained or self._release(name, worker_id)

    def _status(self, name: str) -> PoolStatus:
        return PoolStatus(
            wanted=self._wanted[name],
            present=self._pools[name].workers.count,
            starting=len(self._starting[name]),
            leaving=len(self._leaving[name]),
            since=self._since[name],
            problem=self._problems[name],
        )

    def _tell(self) -> None:
        """Write the answer where it has changed."""
        for name in self._pools:
            if self._status(name).is_settled:
                self._since[name] = None
        self._answers = dict(list(self._answers.items())[-REMEMBERED_ANSWERS:])
        pools = {name: self._status(name) for name in self._pools}
        status = ScaleStatus(pools=pools, answers=dict(self._answers))
        if status != self._told:
            self._requests.write_status(status)
            self._told = status


def _reason(look: Look, change: Mapping[str, int], present: Mapping[str, int]) -> str:
    [(name, count)] = change.items()
    if count > present[name]:
        return f"(the learner waits for it {look.learner_starved_share:.0%} of its time)"
    activity = look.pools[name]
    return f"(idle {activity.starved_share + activity.blocked_share:.0%} of its time)"
