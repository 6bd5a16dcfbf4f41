"""Pools whose size changes while a run goes on.

A worker that is added:    begin_worker --> starting --ready--> adopt(): joins, gets work
A worker that is removed:  leaving: gets no new work --drained--> adopt(): its process ends

The driver calls `advance` between steps, which moves every worker as far as it can go without
waiting. It calls `adopt` just before it publishes weights: joining and leaving change the
weight-transfer group, and a worker that joins there receives the newest weights with all others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import islice
from typing import Any, Protocol, Self

from distill_system.cluster import ElasticPool, WorkerRequest
from distill_system.config.pools import ScalingConfig
from distill_system.elastic.scale_requests import PoolStatus, ScaleRequests, ScaleStatus
from distill_system.elastic.scaling import AutoScaler, ScalingObservation
from distill_system.errors import DistillError
from distill_system.workers import StartedWorker

RECEIVES_WEIGHTS = "student_rollout"
"""The elastic pool whose workers belong to the weight-transfer group."""
REMEMBERED_ANSWERS = 50
"""Answers that stay in status.json, so that a slow `scale` command still finds its own."""


class Starting(Protocol):
    """A worker that starts in the background; see cluster.StartingWorker."""

    @property
    def name(self) -> str:
        """The worker's name, for messages."""

    @property
    def no_place(self) -> str:
        """What the cluster has, once it has found no place for this worker; else ""."""

    def poll(self) -> StartedWorker | None:
        """The worker once it is ready.  Raises: DistillError if it is given up."""

    def cancel(self) -> None:
        """End the start."""


class Starts(Protocol):
    """Starts workers; see cluster.ClusterSession."""

    def begin_worker(
        self, request: WorkerRequest, worker_id: int, arguments: Mapping[str, Any]
    ) -> Any:  # a Starting
        """Begin to place and load a worker."""

    def adopt_worker(self, workers: Any, starting: Any) -> None:
        """Add a ready worker to its group."""


Release = Callable[[str, int], bool]
"""release(pool, worker_id): give this worker no more work and take back what it has not begun.
Returns True once it has no call under way; until then it is asked again at each `advance`."""


class ElasticPools:
    """Brings pools to the sizes that a person or the automatic mode asks for.

    A worker that cannot be placed or loaded is reported and given up; the run goes on without it.
    Use it as a context: requests are read inside the block, and workers that are still starting at
    its end are cancelled.

    release: see Release.  notify: takes one line for the person who watches the run.
    """

    def __init__(
        self,
        pools: Mapping[str, ElasticPool],
        session: Starts,
        scaling: ScalingConfig,
        requests: ScaleRequests,
        *,
        release: Release,
        notify: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pools = dict(pools)
        self._session = session
        self._scaling = scaling
        self._requests = requests
        self._release = release
        self._notify = notify
        self._clock = clock
        self._scaler = AutoScaler(scaling, {name: pool.config for name, pool in pools.items()})
        self._observed_at = clock()
        # Present workers are those in pool.workers. A pool is settled when as many are present as
        # wanted, none is starting and none is leaving.
        self._wanted = {name: pool.workers.count for name, pool in pools.items()}
        self._starting: dict[str, list[Starting]] = {name: [] for name in pools}
        # Worker id -> whether it is drained: no call of it is under way any more.
        self._leaving: dict[str, dict[int, bool]] = {name: {} for name in pools}
        # Wall clock of the request that is not fulfilled yet, for `distill-system scale`.
        self._since: dict[str, float | None] = dict.fromkeys(pools)
        self._problems = dict.fromkeys(pools, "")
        self._answers: dict[str, str] = {}
        self._written: ScaleStatus | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._open.enter_context(self._requests.listening())
        self._write_status()
        return self

    def __exit__(self, *exception: object) -> None:
        for name in self._pools:
            for starting in self._starting[name]:
                starting.cancel()
            self._starting[name] = []
        self._open.close()

    def advance(self, measure: Callable[[], ScalingObservation] | None = None) -> None:
        """Read requests, let the automatic mode decide, move starting and leaving workers on.

        Never waits.  measure: returns what happened since it was last called; called only when the
        automatic mode is due to decide. None turns the automatic mode off for this round.
        """
        for request in self._requests.read_new():
            problem = request.problem or "; ".join(self._refusals(request.wanted))
            self._answers[request.request_id] = problem
            if problem:
                self._notify(f"scale request refused: {problem}")
            else:
                self._set_wanted(request.wanted, "by request")
        self._scale_automatically(measure)
        for name in self._pools:
            self._begin_changes(name)
            self._poll(name)
            self._drain(name)
        self._write_status()

    def has_changes(self) -> bool:
        """Whether `adopt` has something to do: a worker is ready to join, or one is drained."""
        drained = any(any(leaving.values()) for leaving in self._leaving.values())
        return drained or any(self._poll(name) for name in self._pools)

    def adopt(self) -> bool:
        """Let ready workers join and drained ones leave.

        Call it when no publish is under way. Returns whether the weight-transfer group has changed:
        then connect it anew before the next publish. A new student worker holds the weights it was
        loaded with, so give it work only after that publish.
        """
        changed = False
        for name, pool in self._pools.items():
            ready = self._poll(name)
            self._drain(name)
            for starting in ready:
                self._session.adopt_worker(pool.workers, starting)
                self._starting[name].remove(starting)
            drained = [
                worker_id for worker_id, is_drained in self._leaving[name].items() if is_drained
            ]
            for worker_id in drained:
                pool.workers.remove(worker_id)
                del self._leaving[name][worker_id]
            if ready or drained:
                self._notify(f"{name} has {pool.workers.count} workers now")
                self._scaler.start_cool_down(self._clock())
                changed |= name == RECEIVES_WEIGHTS
        self._write_status()
        return changed

    def _refusals(self, wanted: Mapping[str, int]) -> list[str]:
        refusals = []
        for name, count in wanted.items():
            if name not in self._pools:
                refusals.append(f"{name} cannot change; pools that can: {', '.join(self._pools)}")
            elif not self._pools[name].config.fewest <= count <= self._pools[name].config.most:
                bounds = self._pools[name].config
                refusals.append(
                    f"{name}={count} is out of its bounds: expected {bounds.fewest} to "
                    f"{bounds.most} (pools.{name}.min_count, max_count)"
                )
        return refusals

    def _set_wanted(self, wanted: Mapping[str, int], why: str) -> None:
        for name, count in wanted.items():
            if count != self._wanted[name]:
                self._notify(f"{name}: {self._wanted[name]} -> {count} workers {why}")
            self._wanted[name], self._problems[name] = count, ""
            self._since[name] = time.time()
        self._scaler.start_cool_down(self._clock())

    def _scale_automatically(self, measure: Callable[[], ScalingObservation] | None) -> None:
        now = self._clock()
        is_due = now - self._observed_at >= self._scaling.look_every_seconds
        if measure is None or not self._scaling.automatic or not is_due:
            return
        self._observed_at = now
        # Measured even if nothing may change now: the next observation must begin here.
        observation = measure()
        if all(self._status(name).is_settled for name in self._pools):
            present = {name: pool.workers.count for name, pool in self._pools.items()}
            change = self._scaler.decide(observation, present)
            if change:
                self._set_wanted(change, _reason(observation, change, present))

    def _begin_changes(self, name: str) -> None:
        """Start the workers that are missing, or choose as many to leave as are too many."""
        pool, starting, leaving = self._pools[name], self._starting[name], self._leaving[name]
        missing = self._wanted[name] - self._future_count(name)
        for _ in range(missing):
            worker_id = pool.workers.take_id()
            arguments = pool.arguments(worker_id)
            starting.append(self._session.begin_worker(pool.request, worker_id, arguments))
        # Too many: a worker that is still starting has done no work yet, so it goes first. Then
        # present workers, the newest first. One that leaves is never called back; if more workers
        # are wanted again, a new one starts.
        for _ in range(min(-missing, len(starting))):
            starting.pop().cancel()
        surplus = max(0, self._future_count(name) - self._wanted[name])
        staying = (worker for worker in reversed(pool.workers.members) if worker not in leaving)
        leaving.update(dict.fromkeys(islice(staying, surplus), False))

    def _future_count(self, name: str) -> int:
        """Workers of a pool once those that start have joined and those that leave are gone."""
        staying = self._pools[name].workers.count - len(self._leaving[name])
        return staying + len(self._starting[name])

    def _poll(self, name: str) -> list[Starting]:
        """Advance every starting worker and give up those that failed; returns the ready ones."""
        ready = []
        for starting in list(self._starting[name]):
            try:
                if starting.poll() is not None:
                    ready.append(starting)
            except DistillError as error:
                self._starting[name].remove(starting)
                self._wanted[name] -= 1  # or the next round would start it again, for ever
                self._problems[name] = f"{starting.name} is given up: {error}"
                self._notify(f"{self._problems[name]}. The run goes on without it")
                self._scaler.start_cool_down(self._clock())
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
            no_place=next((s.no_place for s in self._starting[name] if s.no_place), ""),
        )

    def _write_status(self) -> None:
        """Write status.json if it has changed."""
        for name in self._pools:
            if self._status(name).is_settled:
                self._since[name] = None
        self._answers = dict(list(self._answers.items())[-REMEMBERED_ANSWERS:])
        pools = {name: self._status(name) for name in self._pools}
        status = ScaleStatus(pools=pools, answers=dict(self._answers))
        if status != self._written:
            self._requests.write_status(status)
            self._written = status


def _reason(
    observation: ScalingObservation, change: Mapping[str, int], present: Mapping[str, int]
) -> str:
    """Why the automatic mode makes this change, for a message."""
    [(name, count)] = change.items()
    if count > present[name]:
        return f"(the learner waits for it {observation.learner_starved_share:.0%} of its time)"
    activity = observation.pools[name]
    return f"(idle {activity.starved_share + activity.blocked_share:.0%} of its time)"
