"""Workers come, go and are lost while a run goes on: one mechanism for all of it.

A worker that is added:    begin_worker --> starting --ready--> adopt(): joins, gets work
A worker that is removed:  leaving: gets no new work --drained--> adopt(): its process ends
A worker that is lost:     lose(): it has left without a word, and one is added in its place

The driver calls `advance` between steps, which moves every worker as far as it can go without
waiting. It calls `adopt` just before it publishes weights: a worker that joins there receives the
newest with all others. Where every worker of a pool is lost, `wait_for_worker` does both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, Self

from distill_system.cluster import ElasticPool, WorkerRequest
from distill_system.config.pools import ELASTIC_POOLS, FaultsConfig, ScalingConfig
from distill_system.elastic.replacement_budget import ReplacementBudget
from distill_system.elastic.scale_requests import PoolStatus, ScaleRequests, ScaleStatus
from distill_system.elastic.scaling import AutoScaler, ScalingObservation
from distill_system.errors import DeadlineError, DistillError, ResourceError, WorkerLostError
from distill_system.workers import StartedWorker

LOOK_SECONDS = 0.2
"""Between two looks at workers that start, where the run cannot go on without one."""
REMEMBERED_ANSWERS = 50
"""Answers that stay in status.json, so that a slow `scale` command still finds its own."""


class Starting(Protocol):
    """A worker that starts in the background; see cluster.StartingWorker."""

    @property
    def name(self) -> str:
        """The worker's name, for messages."""

    @property
    def is_unplaced(self) -> bool:
        """Whether the cluster has not placed it yet."""

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
        self,
        request: WorkerRequest,
        worker_id: int,
        arguments: Mapping[str, Any],
        place: Any = None,
    ) -> Any:  # a Starting
        """Begin to place and load a worker; place: of a lost one, which it takes over."""

    def adopt_worker(self, workers: Any, starting: Any) -> None:
        """Add a ready worker to its group."""

    def pop_lost(self) -> Sequence[WorkerLostError]:
        """Workers that were found dead since this was last asked."""


class Crew(Protocol):
    """Who gives the workers their work; see streams.Streams."""

    def release_worker(self, pool: str, worker: int) -> bool:
        """Give this worker no more work and take back what it has not begun.

        Returns True once it has no call under way; until then it is asked again at each `advance`.
        """

    def forget_worker(self, pool: str, worker: int) -> None:
        """This worker is lost: what it had under way is given to others, or made again."""

    def admit_workers(self) -> None:
        """Workers have joined: let them take part."""

    def bring_weights(self) -> None:
        """Let workers that have joined have the weights that were published last."""


class Weights(Protocol):
    """How weights reach the workers; see run.TransferGroup."""

    @property
    def pools(self) -> Sequence[str]:
        """Names of the pools that receive them."""

    def break_up(self) -> None:
        """A member has come, gone or been lost."""


class FaultRecord(Protocol):
    """Where losses are written down; see observe.FaultLog."""

    def lose(self, worker: str, cause: str) -> None:
        """A worker is lost."""

    def replace(self, worker: str, successor: str, seconds: float) -> None:
        """Another worker has taken its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replacement:
    """A worker that starts in the place of one that is lost.

    lost: its predecessor's name.  since: when that was lost, on the pools' clock.
    """

    starting: Starting
    place: Any
    lost: str
    since: float


class ElasticPools:
    """Brings pools to the sizes that a person or the automatic mode asks for, and keeps them there.

    A worker that is to be added and cannot be placed or loaded is given up, and the run goes on
    without it. One that is lost is replaced, faults.max_replacements times; while the cluster has
    no place for the other, the run goes on with those that are left.

    Use it as a context: requests are read inside the block, and workers that are still starting at
    its end are cancelled.

    pools: every pool but the learner; those whose bounds leave no room keep their size.
    requests: None where nobody may ask for other sizes.
    notify: takes one line for the person who watches the run.
    is_ending: whether a person has ended the run: nobody is replaced any more, since what was sent
        to this process may have ended the workers too.
    """

    def __init__(
        self,
        pools: Mapping[str, ElasticPool],
        session: Starts,
        scaling: ScalingConfig,
        requests: ScaleRequests | None,
        *,
        crew: Crew,
        weights: Weights,
        faults: FaultsConfig,
        fault_log: FaultRecord,
        notify: Callable[[str], None],
        is_ending: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._crew = crew
        self._pools = dict(pools)
        self._session = session
        self._scaling = scaling
        self._requests = requests
        self._weights = weights
        self._fault_log = fault_log
        self._notify = notify
        self._is_ending = is_ending
        self._clock = clock
        self._sleep = sleep
        self._scaler = AutoScaler(
            scaling,
            {name: pools[name].config for name in ELASTIC_POOLS if name in pools},
            {name: pool.request.ranks for name, pool in pools.items()},
        )
        self._observed_at = clock()
        # Present workers are those in pool.workers. A pool is settled when as many are present as
        # wanted, none is starting and none is leaving.
        self._wanted = {name: pool.workers.count for name, pool in pools.items()}
        self._starting: dict[str, list[Starting]] = {name: [] for name in pools}
        self._replacements: dict[str, list[_Replacement]] = {name: [] for name in pools}
        self._budgets = {name: ReplacementBudget(name, faults, clock=clock) for name in pools}
        # Worker id -> whether it is drained: no call of it is under way any more.
        self._leaving: dict[str, dict[int, bool]] = {name: {} for name in pools}
        # Wall clock of the request that is not fulfilled yet, for `distill-system scale`.
        self._since: dict[str, float | None] = dict.fromkeys(pools)
        self._problems = dict.fromkeys(pools, "")
        self._answers: dict[str, str] = {}
        self._written: ScaleStatus | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if self._requests is not None:
            self._open.enter_context(self._requests.listening())
        self._write_status()
        return self

    def __exit__(self, *exception: object) -> None:
        for name in self._pools:
            for starting in self._all_starting(name):
                starting.cancel()
            self._starting[name], self._replacements[name] = [], []
        self._open.close()

    def advance(self, measure: Callable[[], ScalingObservation] | None = None) -> None:
        """Read requests, let the automatic mode decide, move starting and leaving workers on.

        Never waits.  measure: returns what happened since it was last called; called only when the
        automatic mode is due to decide. None turns the automatic mode off for this round.
        """
        for request in self._requests.read_new() if self._requests is not None else ():
            problem = request.problem or "; ".join(self._refusals(request.wanted))
            self._answers[request.request_id] = problem
            if problem:
                self._notify(f"scale request refused: {problem}")
            else:
                self._set_wanted(request.wanted, "by request")
        self._scale_automatically(measure)
        self.notice()
        for name in self._pools:
            self._begin_changes(name)
            self._poll(name)
            self._drain(name)
        self._write_status()

    def has_changes(self) -> bool:
        """Whether `adopt` has something to do: a worker is ready to join, or one is drained."""
        drained = any(any(leaving.values()) for leaving in self._leaving.values())
        return drained or any(self._poll(name) for name in self._pools)

    def adopt(self) -> None:
        """Let ready workers join and drained ones leave.

        Call it when no publish is under way. A student worker that joins holds the weights it was
        loaded with, and gets work after the next publish.
        """
        for name, pool in self._pools.items():
            ready = self._poll(name)
            self._drain(name)
            for starting in ready:
                self._session.adopt_worker(pool.workers, starting)
                self._settle(name, starting)
            drained = [
                worker_id for worker_id, is_drained in self._leaving[name].items() if is_drained
            ]
            for worker_id in drained:
                pool.workers.remove(worker_id)
                del self._leaving[name][worker_id]
            if ready or drained:
                self._notify(f"{name} has {self._present(name)} workers now")
                self._scaler.start_cool_down(self._clock())
                self._break_up(name)
        self._crew.admit_workers()
        self._write_status()

    def supervise(self, crew: Crew) -> Self:
        """From now on, this crew gives the workers their work."""
        self._crew = crew
        return self

    def lose(self, lost: WorkerLostError) -> None:
        """End this worker, if nobody has, and begin to replace it in its place.

        Raises: `lost` itself where faults.max_replacements are used up, for a worker of another
        pool, or as the run ends.
        """
        if lost.pool not in self._pools or self._is_ending():
            raise lost
        name, worker_id, workers = lost.pool, lost.worker_id, self._pools[lost.pool].workers
        if worker_id not in workers.members:
            return  # it was lost before, or has left
        self._crew.forget_worker(name, worker_id)
        place = workers.vacate(worker_id)
        self._break_up(name)
        self._fault_log.lose(lost.worker, str(lost))
        if self._leaving[name].pop(worker_id, None) is not None:
            workers.close(place)
            return
        self._notify(f"{lost.brief}; it is replaced, and the run goes on")
        self._replace(name, place, lost)

    def notice(self) -> None:
        """Lose the workers of which Ray says by now that they are dead."""
        for lost in self._session.pop_lost():
            self.lose(lost)

    def wait_for_worker(self, pool: str) -> None:
        """Return once the pool has a worker; one that holds the student then holds its weights.

        Call it while no publish is under way and the learner is idle.

        Raises: ResourceError, DeadlineError or what loading raised, if none comes.
        """
        while not self._present(pool):
            if self._is_ending():
                raise WorkerLostError(f"{pool} has no worker left, and the run ends")
            assert self._all_starting(pool), f"{pool} has lost its workers and replaces none"
            if self._poll(pool):
                # Those of other pools that are ready join with it, and a step may wait for them.
                holds_student = any(self._poll(name) for name in self._weights.pools)
                self.adopt()
                if holds_student:
                    self._crew.bring_weights()
            else:
                self._sleep(LOOK_SECONDS)

    def _replace(
        self, name: str, place: Any, lost: WorkerLostError, *, counts: bool = True
    ) -> None:
        """Start a worker in the place of a lost one."""
        if counts:
            self._budgets[name].spend(lost)
        pool = self._pools[name]
        worker_id = pool.workers.take_id()
        starting = self._session.begin_worker(
            pool.request, worker_id, pool.arguments(worker_id), place
        )
        self._replacements[name].append(
            _Replacement(starting=starting, place=place, lost=lost.worker, since=self._clock())
        )

    def _settle(self, name: str, starting: Starting) -> None:
        """A worker that was starting has joined."""
        if starting in self._starting[name]:
            self._starting[name].remove(starting)
            return
        [done] = [each for each in self._replacements[name] if each.starting is starting]
        self._replacements[name].remove(done)
        seconds = self._clock() - done.since
        self._fault_log.replace(done.lost, starting.name, seconds)
        self._notify(f"{starting.name} has taken the place of {done.lost}, after {seconds:.1f} s")

    def _break_up(self, name: str) -> None:
        if name in self._weights.pools:
            self._weights.break_up()

    def _present(self, name: str) -> int:
        return len(self._pools[name].workers.members)

    def _all_starting(self, name: str) -> list[Starting]:
        return [*self._starting[name], *(each.starting for each in self._replacements[name])]

    def _refusals(self, wanted: Mapping[str, int]) -> list[str]:
        refusals = []
        over, budget = self._scaler.over_budget({**self._wanted, **wanted}), self._scaling.budget
        if over and budget is not None:
            asked = ", ".join(f"{name}={count}" for name, count in wanted.items())
            refusals.append(
                f"{asked} takes {over:g} more than scaling.total_{budget[0]}={budget[1]:g}: let "
                "another pool have less in the same request"
            )
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
        changes = [
            f"{name}: {self._wanted[name]} -> {count} workers"
            for name, count in wanted.items()
            if count != self._wanted[name]
        ]
        if changes:
            self._notify(f"{', '.join(changes)} {why}")
        for name, count in wanted.items():
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
            present = {name: self._present(name) for name in self._pools}
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
        replacements = self._replacements[name]
        for _ in range(min(self._future_count(name) - self._wanted[name], len(replacements))):
            dropped = replacements.pop()
            dropped.starting.cancel()
            pool.workers.close(dropped.place)
        surplus = max(0, self._future_count(name) - self._wanted[name])
        staying = (worker for worker in reversed(pool.workers.members) if worker not in leaving)
        leaving.update(dict.fromkeys(islice(staying, surplus), False))

    def _future_count(self, name: str) -> int:
        """Workers of a pool once those that start have joined and those that leave are gone."""
        staying = self._present(name) - len(self._leaving[name])
        return staying + len(self._all_starting(name))

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
        for replacement in list(self._replacements[name]):
            try:
                if replacement.starting.poll() is not None:
                    ready.append(replacement.starting)
            except DistillError as error:
                self._replacements[name].remove(replacement)
                self._replace_again(name, replacement, error)
        return ready

    def _replace_again(self, name: str, failed: _Replacement, error: DistillError) -> None:
        """A replacement was not placed, or did not load its model.

        Raises: `error` where the pool has nobody left and no place came in time, or where it is
        nothing that another attempt would mend.
        """
        is_unplaced = isinstance(error, ResourceError) and failed.starting.is_unplaced
        if not isinstance(error, WorkerLostError | DeadlineError) and not is_unplaced:
            raise error
        if is_unplaced and not self._present(name):
            raise error
        self._notify(f"{error}. It is tried again; until then {name} goes on with what is left")
        lost = WorkerLostError(str(error), failed.lost)
        self._replace(name, failed.place, lost, counts=not is_unplaced)

    def _drain(self, name: str) -> None:
        for worker_id, drained in self._leaving[name].items():
            self._leaving[name][worker_id] = drained or self._crew.release_worker(name, worker_id)

    def _status(self, name: str) -> PoolStatus:
        return PoolStatus(
            wanted=self._wanted[name],
            present=self._present(name),
            starting=len(self._all_starting(name)),
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
        if status != self._written and self._requests is not None:
            self._requests.write_status(status)
            self._written = status


def _reason(
    observation: ScalingObservation, change: Mapping[str, int], present: Mapping[str, int]
) -> str:
    """Why the automatic mode makes this change, for a message."""
    reasons = []
    for name, count in change.items():
        if count > present[name]:
            waits = observation.learner_starved_share
            reasons.append(f"the learner waits for it {waits:.0%} of its time")
        else:
            activity = observation.pools[name]
            idle = activity.starved_share + activity.blocked_share
            reasons.append(f"{name} is idle {idle:.0%} of its time")
    return f"({', '.join(reasons)})"
