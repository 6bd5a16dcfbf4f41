"""Modelled pools on real Ray: the real driver, streams, queues and learner's door; workers sleep.

A worker is a process of its own that makes a call last as long as its cost model says. What the
driver itself costs is measured: CPU time of its thread, and of its whole process, in which Ray's
own threads work too.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modelled_pools import ModelledLearner, ModelledRollout, ModelledScorer
from modelled_runs import POOLS, Measured, Setting, mean_ages
from rich.console import Console

from distill_system.cluster import ClusterSession, RayWorkers, WorkerRequest
from distill_system.driver import Driver
from distill_system.learner import LearnerGroup
from distill_system.observe import LiveView, MetricLog, PromptLog, RunDirectory, Timings
from distill_system.records import Author
from distill_system.rollout import RolloutPool
from distill_system.scoring import ScoringPool
from distill_system.stages.context import RunContext
from distill_system.stages.pools import Pools, wait_until_ready


def lasting(call: Callable[..., tuple[Any, float]], *arguments: Any) -> Any:
    """The call's result once its seconds are over."""
    started = time.perf_counter()
    result, seconds = call(*arguments)
    time.sleep(max(0.0, started + seconds - time.perf_counter()))
    return result() if callable(result) else result


class SleepingRollout:
    """A rollout worker; see ModelledRollout."""

    def __init__(self, **how: Any) -> None:
        self._model = ModelledRollout(**how)

    def ready(self) -> None:
        """Its process stands."""

    def advance(self, *arguments: Any) -> Any:
        return lasting(self._model.advance, *arguments)

    def generate(self, *arguments: Any) -> Any:
        return lasting(self._model.generate, *arguments)

    def receive_weights(self, version: int) -> Any:
        return lasting(self._model.receive_weights, version)

    def work_done(self) -> Any:
        return lasting(self._model.work_done)


class SleepingScorer:
    """A teacher scorer; see ModelledScorer."""

    def __init__(self, cost: tuple[float, float]) -> None:
        self._model = ModelledScorer(cost)

    def ready(self) -> None:
        """Its process stands."""

    def score(self, *arguments: Any) -> Any:
        return lasting(self._model.score, *arguments)

    def work_done(self) -> Any:
        return lasting(self._model.work_done)


class SleepingLearner:
    """The learner's rank 0; see ModelledLearner."""

    def __init__(self, cost: tuple[float, float], pack_seconds: float) -> None:
        self._receivers: list[Any] = []
        self._model = ModelledLearner(cost, pack_seconds=pack_seconds, send=self._send)

    def ready(self) -> None:
        """Its process stands."""

    def join(self, receivers: Sequence[Any]) -> None:
        """Publish to these from now on."""
        self._receivers = list(receivers)

    def step(self, *arguments: Any) -> Any:
        return lasting(self._model.step, *arguments)

    def start_publish(self, version: int) -> Any:
        return lasting(self._model.start_publish, version)

    def _send(self, version: int) -> list[Any]:
        return [receiver.receive_weights.remote(version) for receiver in self._receivers]


def run_on_ray(setting: Setting, *, profile: Path | None = None) -> Measured:
    """One run.  profile: where to write what the driver did, by function."""
    config, data = setting.config(), setting.data()
    with ExitStack() as stack:
        run = RunDirectory(Path(stack.enter_context(TemporaryDirectory())) / "run")
        context = RunContext(
            config=config,
            run=run,
            cluster=stack.enter_context(ClusterSession(config, say=print)),
            tokenizer=None,
            data=data,
            log=stack.enter_context(MetricLog(run, run_name="modelled")),
            prompts=stack.enter_context(PromptLog(run)),
            timings=Timings(run),
            view=stack.enter_context(LiveView("modelled", console=Console(file=StringIO()))),
            resume=False,
        )
        driver = Driver(context, _open_pools(setting, context), data)
        return _Watched(setting, driver, profile).play()


def _open_pools(setting: Setting, context: RunContext) -> Pools:
    placed = context.cluster.start_pools(_requests(setting))
    for workers in placed:
        wait_until_ready(context, workers)
    groups = dict(zip(POOLS, placed, strict=True))
    students = groups["student_rollout"]
    receivers = list(students.named_handles().values())
    learner = groups["learner"]
    learner.finish([learner.start(0, "join", receivers)], what="the learner to meet its receivers")
    return Pools(
        students=RolloutPool(students),
        teachers=RolloutPool(groups["teacher_rollout"]),
        scorers=ScoringPool(groups["teacher_scoring"]),
        learner=LearnerGroup(learner),
        evaluation=RolloutPool(students),
        elastic={},
        connect_rollouts=lambda: None,
    )


def _requests(setting: Setting) -> list[WorkerRequest]:
    costs, pools = setting.costs, setting.config().pools.by_name
    how = {
        "lengths": setting.lengths,
        "max_num_sequences": setting.num_sequences,
        "send_seconds": costs.send,
    }
    student = {"author": Author.STUDENT, "cost": costs.student, **how}
    teacher = {"author": Author.TEACHER, "cost": costs.teacher, **how}
    kinds: dict[str, tuple[type, dict[str, Any]]] = {
        "student_rollout": (SleepingRollout, student),
        "teacher_rollout": (SleepingRollout, teacher),
        "teacher_scoring": (SleepingScorer, {"cost": costs.score}),
        "learner": (SleepingLearner, {"cost": costs.learn, "pack_seconds": costs.pack}),
    }
    return [
        WorkerRequest(
            name=name,
            worker_class=kinds[name][0],
            arguments=[kinds[name][1]] * pools[name].count,
            pool=pools[name],
            environment={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        for name in POOLS
    ]


class _Watched:
    """The driver's steps with its ledger, and what they cost."""

    def __init__(self, setting: Setting, driver: Driver, profile: Path | None) -> None:
        self._setting, self._driver, self._profile = setting, driver, profile
        self._rows: list[dict[str, float]] = []

    def play(self) -> Measured:
        setting, driver = self._setting, self._driver
        profiler = cProfile.Profile() if self._profile is not None else None
        driver.ledger.open()
        driver.streams.begin(0)
        begin, activity = self._mark(), {}
        for step in range(setting.last):
            if step == setting.first:
                activity, begin = driver.streams.pop_activity(), self._mark()
                if profiler is not None:
                    profiler.enable()
            self._step(step)
        end, activity = self._mark(), driver.streams.pop_activity()
        if profiler is not None:
            profiler.disable()
            self._write(profiler)
        return self._measured([late - early for early, late in zip(begin, end, strict=True)], activity)

    def _step(self, step: int) -> None:
        started = time.perf_counter()
        result = self._driver.step(step)
        metrics = self._driver.ledger.describe_step(result, time.perf_counter() - started)
        self._driver.ledger.write(step + 1, metrics)
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
        """Of the ledger's rows, which take the streams' activity step by step; else of the whole."""
        name = f"busy_share/{pool}"
        if not all(name in row for row in self._rows):
            return float(activity[pool].busy_share)
        seconds = [row["seconds/step"] for row in self._rows]
        return sum(
            row[name] * s for row, s in zip(self._rows, seconds, strict=True)
        ) / sum(seconds)

    def _write(self, profiler: cProfile.Profile) -> None:
        assert self._profile is not None
        with self._profile.open("w") as file:
            pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(45)


__all__ = ["RayWorkers", "run_on_ray"]
