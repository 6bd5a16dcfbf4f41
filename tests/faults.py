"""Faults from outside: workers of a run are killed, stopped or cut off, at moments drawn by seed.

A run that is going on is known by its processes and by the files in its folder, as a person knows
it; nothing in it takes part.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import psutil
from machines import Machine, RayNodes

from distill_system.cluster.placement import WORKER_VARIABLE
from distill_system.observe import RunDirectory
from distill_system.observe.fault_log import FaultRow, read_faults

if TYPE_CHECKING:  # scripts reach that module by another name
    from pipeline.command_line import Run

LOOK_SECONDS = 0.02
MOST_ROW_BYTES = 1 << 16

DARK_SECONDS = 45.0
"""Ray gives a node up after about 30 s in which it hears nothing of it."""


class Way(StrEnum):
    """How a worker is lost."""

    KILL = "killed"
    STOP = "stopped"
    CUT = "cut off"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A fault that is to come: once so many steps are done, and a moment later."""

    step: int
    pool: str
    way: Way
    moment: float


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What was done. workers: the names of those that it costs.  step: steps done.  time: wall."""

    way: Way
    pool: str
    workers: tuple[str, ...]
    step: int
    time: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a fault, by the run's own faults.jsonl.

    noticed_after, back_after: seconds from the fault; None if the run did not notice, or has not
        replaced all that was lost.
    """

    fault: Fault
    noticed_after: float | None
    back_after: float | None
    steps_again: int


def plan_faults(
    count: int,
    *,
    steps: int,
    pools: Sequence[str],
    ways: Sequence[Way],
    seed: int,
) -> list[Planned]:
    """So many faults over a run of so many steps; no kind, a pool and a way, comes a second time
    before every other has come once."""
    draw = random.Random(seed)
    every = [(pool, way) for pool in pools for way in ways]
    kinds: list[tuple[str, Way]] = []
    while len(kinds) < count:
        kinds += draw.sample(every, len(every))
    moments = sorted(draw.randrange(1, steps - 1) for _ in range(count))
    return [
        Planned(step=step, pool=pool, way=way, moment=draw.random())
        for step, (pool, way) in zip(moments, kinds, strict=False)
    ]


def find_workers(run: Run, nodes: RayNodes | None = None) -> dict[str, psutil.Process]:
    """The processes of a run's workers by name, pool-id; those that are stopped left out.

    nodes: the cluster that it has joined; None: it started its own.
    """
    found: dict[str, psutil.Process] = {}
    for process in run.processes() if nodes is None else nodes.processes():
        try:
            name = process.environ().get(WORKER_VARIABLE)
            is_worker = "".join(process.cmdline()[:1]).startswith("ray::")
            if name and is_worker and process.status() != psutil.STATUS_STOPPED:
                found[name] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def newest_step(folder: RunDirectory) -> int:
    """The step of the last whole row of metrics.jsonl; -1 before the first.

    Rows of steps that are made again are cut off, so it may fall.
    """
    try:
        with folder.metrics_path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MOST_ROW_BYTES))
            *whole, _ = file.read().split(b"\n")
    except FileNotFoundError:
        return -1
    return int(json.loads(whole[-1])["step"]) if whole else -1


@dataclass
class Injector:
    """Breaks one run.

    nodes: the cluster that it runs on, if its cables can be pulled; a node that was cut off comes
        back as another machine of the same kind, as an autoscaler would bring it.
    """

    run: Run
    folder: RunDirectory
    seed: int
    nodes: RayNodes | None = None
    done: list[Fault] = field(default_factory=list)
    _dark: list[tuple[float, Machine]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def carry_out(self, planned: Iterable[Planned]) -> None:
        """Inject each fault when its step is done; returns after the last, or at the run's end."""
        for each in planned:
            self.wait_for_step(each.step)
            self._sleep(each.moment)
            while self._is_going_on() and not self.inject(each.pool, each.way):
                self._sleep(0.5)  # the pool has nobody just now
            if not self._is_going_on():
                return

    def inject(self, pool: str, way: Way) -> bool:
        """Let a worker of a pool be lost; False if it has none just now.

        Where all of them are on the head, whose cable stays, one is killed in place of cut off.
        """
        workers = find_workers(self.run, self.nodes)
        of_pool = sorted(name for name in workers if name.rpartition("-")[0] == pool)
        if way is Way.CUT:
            apart = [name for name in of_pool if self._machine_of(workers[name]) is not None]
            way, of_pool = (way, apart) if apart else (Way.KILL, of_pool)
        if not of_pool:
            return False
        name = self._random.choice(of_pool)
        step, now, names = self.last_step(), time.time(), [name]
        try:
            if way is Way.KILL:
                workers[name].kill()
            elif way is Way.STOP:
                workers[name].suspend()
            else:
                names = self._cut_off(workers, name)
        except psutil.NoSuchProcess:
            return False
        self.done.append(Fault(way=way, pool=pool, workers=tuple(names), step=step, time=now))
        return True

    def tend(self) -> None:
        """Bring other machines for those that have been dark long enough."""
        for dark_since, machine in list(self._dark):
            if time.monotonic() - dark_since > DARK_SECONDS:
                assert self.nodes is not None
                self._dark.remove((dark_since, machine))
                self.nodes.replace(machine)

    def wait_for_step(self, step: int) -> None:
        """Return once so many steps are done, or the run has ended."""
        for _ in self._until(lambda: self.last_step() >= step):
            pass

    def wait_for_end(self) -> None:
        """Return once the run has ended; machines are brought meanwhile."""
        for _ in self._until(lambda: False):
            pass

    def last_step(self) -> int:
        """Steps done."""
        return newest_step(self.folder)

    def _cut_off(self, workers: dict[str, psutil.Process], name: str) -> list[str]:
        machine = self._machine_of(workers[name])
        assert machine is not None
        names = [other for other in workers if self._machine_of(workers[other]) is machine]
        machine.unplug()
        self._dark.append((time.monotonic(), machine))
        return names

    def _machine_of(self, process: psutil.Process) -> Machine | None:
        """The machine whose cable can be pulled to lose this worker: not the head's."""
        nodes = self.nodes.nodes[1:] if self.nodes is not None else []
        lit = [each for each in nodes if all(each is not dark for _, dark in self._dark)]
        return next((each for each in lit if each.holds(process.pid)), None)

    def _until(self, condition: Callable[[], bool]) -> Iterator[None]:
        while self._is_going_on() and not condition():
            self.tend()
            time.sleep(LOOK_SECONDS)
            yield

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for _ in self._until(lambda: time.monotonic() >= end):
            pass

    def _is_going_on(self) -> bool:
        return self.run.process.poll() is None


def read_outcomes(faults: Sequence[Fault], folder: RunDirectory) -> list[Outcome]:
    """What the run says became of each fault."""
    rows = read_faults(folder)
    return [_read_outcome(fault, rows) for fault in faults]


def _read_outcome(fault: Fault, rows: Sequence[FaultRow]) -> Outcome:
    """The first rows of the lost workers after the fault. Ranks are lost and come together."""
    after = [row for row in rows if row.time >= fault.time and _tells_of(row, fault)]
    lost = [row.time for row in after if row.event == "lost"]
    back = {_party(row.worker): row for row in reversed(after) if row.event != "lost"}
    wanted = {_party(worker) for worker in fault.workers}
    whole = wanted <= back.keys()
    return Outcome(
        fault=fault,
        noticed_after=min(lost) - fault.time if lost else None,
        back_after=max(row.time for row in back.values()) - fault.time if whole else None,
        steps_again=sum(row.steps_again for row in back.values()),
    )


def _tells_of(row: FaultRow, fault: Fault) -> bool:
    return _party(row.worker) in {_party(worker) for worker in fault.workers}


def _party(worker: str) -> str:
    """Who is lost with a worker: itself, or all ranks of the learner."""
    pool, _, _ = worker.rpartition("-")
    return pool if pool == "learner" else worker
