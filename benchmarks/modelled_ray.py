"""Modelled pools on real Ray: the real driver, streams, queues and learner's door; workers sleep.

A call lasts as long as its cost model says, in a process that several workers may share: they only
sleep. What the driver itself costs is measured: CPU time of its thread, and of its whole process,
in which Ray's own threads work too.
"""

from __future__ import annotations

import asyncio
import cProfile
import pstats
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import ray
from modelled_pools import EngineCost, ModelledLearner, ModelledRollout, ModelledScorer
from modelled_runs import POOLS, Measured, Setting, mean_ages
from rich.console import Console

from distill_system.cluster import (
    ClusterSession,
    ElasticPool,
    RayWorkers,
    SupervisedWorkers,
    WorkerRequest,
)
from distill_system.cluster.liveness import LivenessMonitor
from distill_system.driver import Driver
from distill_system.learner import LearnerGroup
from distill_system.observe import LiveView, MetricLog, PromptLog, RunDirectory, Timings
from distill_system.records import Author
from distill_system.rollout import RolloutPool
from distill_system.run.context import RunContext
from distill_system.run.pools import Pools
from distill_system.scoring import ScoringPool

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fakes.direct_transfer import DirectTransfer

PUBLISH_SECONDS = 60.0
ROLLOUT_PROCESSES = 4
"""The student's rollout workers share them; two more processes have the other pools."""


class Host:
    """A process of modelled workers: each answers its calls one by one, in their order."""

    def __init__(self) -> None:
        self._workers: list[Any] = []
        self._locks: list[asyncio.Lock] = []

    async def open(self, makers: Sequence[Callable[[], Any]]) -> None:
        """Take these workers in, instead of those of an earlier run."""
        self._workers = [make() for make in makers]
        self._locks = [asyncio.Lock() for _ in makers]

    async def answer(self, at: int, method: str, *arguments: Any) -> Any:
        """The worker's result once its seconds are over."""
        worker = self._workers[at]  # what an earlier run left under way is not for the next one's
        async with self._locks[at]:
            started = time.perf_counter()
            result, seconds = getattr(worker, method)(*arguments)
            await asyncio.sleep(started + seconds - time.perf_counter())
            return result() if callable(result) else result


@dataclass(frozen=True)
class Hosted:
    """One worker of a host, called as Ray's own handles are."""

    host: Any
    at: int

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            return getattr(self.host, method)
        return SimpleNamespace(
            remote=partial(self.host.answer.remote, self.at, method),
            options=lambda **how: SimpleNamespace(
                remote=partial(self.host.answer.options(**how).remote, self.at, method)
            ),
        )

    def __getstate__(self) -> tuple[Any, int]:
        return self.host, self.at

    def __setstate__(self, state: tuple[Any, int]) -> None:
        object.__setattr__(self, "host", state[0])
        object.__setattr__(self, "at", state[1])


def publishing_learner(
    cost: tuple[float, float], pack_seconds: float, receivers: Sequence[Hosted]
) -> ModelledLearner:
    """A learner that sends to these."""

    def send(version: int) -> list[Any]:
        return [receiver.receive_weights.remote(version) for receiver in receivers]

    return ModelledLearner(cost, pack_seconds=pack_seconds, send=send)


@contextmanager
def hosts() -> Iterator[list[Any]]:
    """A local Ray with the processes that all runs share."""
    config = Setting(workers=1, max_staleness=0).config()
    with ClusterSession(config, notify=print):
        made = [
            ray.remote(num_cpus=0, max_concurrency=1000)(Host).remote()
            for _ in range(ROLLOUT_PROCESSES + 2)
        ]
        ray.get([host.__ray_ready__.remote() for host in made])
        yield made


def run_on_ray(setting: Setting, hosts: Sequence[Any], *, profile: Path | None = None) -> Measured:
    """One run.  profile: where to write what the driver did, by function, in CPU seconds."""
    config, data = setting.config(), setting.data()
    with ExitStack() as stack:
        run = RunDirectory(Path(stack.enter_context(TemporaryDirectory())) / "run")
        context = RunContext(
            config=config,
            run=run,
            cluster=ClusterSession(config, notify=print),
            tokenizer=None,
            data=data,
            log=stack.enter_context(MetricLog(run, run_name="modelled")),
            prompts=stack.enter_context(PromptLog(run)),
            timings=Timings(run),
            view=stack.enter_context(LiveView("modelled", console=Console(file=StringIO()))),
            resume=False,
        )
        driver = Driver(context, _open_pools(setting, context, hosts), data)
        return _Watched(setting, driver, profile).play()


def _open_pools(setting: Setting, context: RunContext, hosts: Sequence[Any]) -> Pools:
    """Student rollouts dealt over the first processes, scorers and teacher's rollouts, learner."""
    costs = setting.costs
    how = {"max_num_sequences": setting.num_sequences, "send_seconds": costs.send}

    def rollouts(author: Author, cost: EngineCost, count: int) -> list[Callable[[], Any]]:
        return [partial(ModelledRollout, author, cost, setting.lengths, **how)] * count

    *rollout_hosts, scoring_host, learner_host = hosts
    makers = rollouts(Author.STUDENT, costs.student, setting.workers)
    students = [
        Hosted(rollout_hosts[at % len(rollout_hosts)], at // len(rollout_hosts))
        for at in range(setting.workers)
    ]
    teachers = rollouts(Author.TEACHER, costs.teacher, setting.teachers)
    scorers = [partial(ModelledScorer, costs.score)] * setting.scorers
    learner = partial(publishing_learner, costs.learn, costs.pack, students)
    ray.get(
        [
            host.open.remote(makers[at :: len(rollout_hosts)])
            for at, host in enumerate(rollout_hosts)
        ]
        + [scoring_host.open.remote([*teachers, *scorers]), learner_host.open.remote([learner])]
    )
    reading = [Hosted(scoring_host, at) for at in range(setting.teachers + setting.scorers)]
    handles = {
        "student_rollout": students,
        "teacher_rollout": reading[: setting.teachers],
        "teacher_scoring": reading[setting.teachers :],
        "learner": [Hosted(learner_host, 0)],
    }
    seconds, monitor = context.config.deadlines.call_seconds, LivenessMonitor()
    groups = {
        name: RayWorkers(name, handles[name], [], call_seconds=seconds, monitor=monitor)
        for name in POOLS
    }
    learner_group = LearnerGroup(groups["learner"])
    learner_group.connect_rollouts("modelled", None, setting.workers, PUBLISH_SECONDS)
    supervised = {name: SupervisedWorkers(name, groups[name]) for name in POOLS}
    students = RolloutPool(supervised["student_rollout"])
    weights: Any = DirectTransfer(learner_group, groups["student_rollout"])
    pools = context.config.pools.by_name
    placed = {
        name: ElasticPool(
            workers=groups[name],
            request=WorkerRequest(name=name, worker_class=Host, arguments=[{}], pool=pools[name]),
        )
        for name in POOLS
        if name != "learner"
    }
    return Pools(
        students=students,
        teachers=RolloutPool(supervised["teacher_rollout"]),
        scorers=ScoringPool(supervised["teacher_scoring"]),
        learner=learner_group,
        ranks=groups["learner"],
        evaluation=students,
        weights=weights,
        placed=placed,
    )


class _Watched:
    """The driver's steps with its recorder, and what they cost."""

    def __init__(self, setting: Setting, driver: Driver, profile: Path | None) -> None:
        self._setting, self._driver, self._profile = setting, driver, profile
        self._rows: list[dict[str, float]] = []

    def play(self) -> Measured:
        setting, driver = self._setting, self._driver
        profiler = cProfile.Profile(time.thread_time) if self._profile is not None else None
        driver.recorder.open()
        driver.streams.begin(0)
        begin, activity = self._mark(), {}
        for step in range(setting.last):
            if step == setting.first:
                activity, begin = driver.streams.pop_activity(), self._mark()
                if profiler is not None:
                    profiler.enable()
            self._step(step)
        end, activity = self._mark(), driver.streams.pop_activity()
        driver.streams.wait_for_weight_sync()  # the next run begins on the same hosts
        if profiler is not None:
            profiler.disable()
            self._write(profiler)
        spent = [late - early for early, late in zip(begin, end, strict=True)]
        return self._measured(spent, activity)

    def _step(self, step: int) -> None:
        started = time.perf_counter()
        result = self._driver.step(step)
        metrics = self._driver.recorder.describe_step(result, time.perf_counter() - started)
        self._driver.recorder.write(step + 1, metrics)
        if step >= self._setting.first:
            self._rows.append(metrics)

    def _mark(self) -> list[float]:
        return [time.perf_counter(), time.thread_time(), time.process_time()]

    def _measured(self, spent: Sequence[float], activity: dict[str, Any]) -> Measured:
        setting, (wall, thread, process) = self._setting, spent
        steps = setting.last - setting.first
        trajectories = steps * setting.batch * (2 if setting.both_streams else 1)
        busy = {name: self._busy(name, activity) for name in POOLS}
        aged = [row for row in self._rows if "staleness/tokens" in row]
        return Measured(
            setting=setting,
            step_seconds=wall / steps / setting.stretch,
            busy=busy,
            ages=mean_ages(aged) if aged else {"0": 1.0},
            driver_ms=1e3 * thread / trajectories,
            process_ms=1e3 * process / trajectories,
        )

    def _busy(self, pool: str, activity: dict[str, Any]) -> float:
        """By the recorder's rows, which take the activity step by step, where they tell of it."""
        name = f"busy_share/{pool}"
        if not all(name in row for row in self._rows):
            return float(activity[pool].busy_share)
        seconds = [row["seconds/step"] for row in self._rows]
        return sum(row[name] * s for row, s in zip(self._rows, seconds, strict=True)) / sum(seconds)

    def _write(self, profiler: cProfile.Profile) -> None:
        assert self._profile is not None
        with self._profile.open("w") as file:
            pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(45)
