"""What Prometheus sees of a run and its engines, through the metrics endpoint of Ray's nodes.

A value that is set once stands on Ray's endpoint for 20 s (twice metrics_report_interval_ms) and
then it is gone. So a thread sets the last value of each series again and again, as long as the run
goes on, however long a step takes; and a run that has ended, or was killed, vanishes by itself.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from distill_system import __version__
from distill_system.config import RunConfig
from distill_system.observe.live import LiveTask
from distill_system.observe.series import Series, to_series
from distill_system.records import EngineLoad

REFRESH_SECONDS = 5.0
"""Ray reads a process's gauges every 10 s."""

MAIN_STAGE = "distill"

MODELS = ("teacher", "student")

LEARNER = "learner"
"""The pool whose ranks count as one worker."""

SUMMED = {
    "sampled_tokens/student": Series.of("distill_written_tokens", author="student"),
    "sampled_tokens/teacher": Series.of("distill_written_tokens", author="teacher"),
    "learner/response_tokens": Series.of("distill_learned_tokens"),
}
"""Metrics of a step that are shown as sums since this process began, too: what a step had is gone
when the next one overwrites it, and Prometheus looks only now and then."""


class Gauges:
    """The gauges of this process; they stay until `close`, and then for 20 s.

    labels: of every series.  record: takes (series with all labels, value); tests have their own.
    """

    def __init__(
        self,
        labels: Mapping[str, str],
        *,
        refresh_seconds: float = REFRESH_SECONDS,
        record: Callable[[Series, float], None] | None = None,
    ) -> None:
        self._labels = dict(labels)
        self._refresh_seconds = refresh_seconds
        self._record = record or _RayGauges().record
        self._values: dict[Series, float] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="gauges", daemon=True)

    def start(self) -> None:
        """Begin to set what there is again and again."""
        self._thread.start()

    def set(self, series: Series, value: float) -> None:
        """Show this value from now on."""
        whole = Series.of(series.name, **{**self._labels, **dict(series.labels)})
        with self._lock:
            self._values[whole] = value

    def add(self, series: Series, amount: float) -> None:
        """Show this much more than before; a series begins at 0."""
        whole = Series.of(series.name, **{**self._labels, **dict(series.labels)})
        with self._lock:
            self._values[whole] = self._values.get(whole, 0.0) + amount

    def flush(self) -> None:
        """Hand every value to Ray now."""
        with self._lock:
            values = dict(self._values)
        for series, value in values.items():
            self._record(series, value)

    def close(self) -> None:
        """Set nothing any more; comes before Ray is shut down."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _refresh(self) -> None:
        while not self._closed.wait(self._refresh_seconds):
            self.flush()


class _RayGauges:
    """Ray's own gauges, each made when its first value comes."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def record(self, series: Series, value: float) -> None:
        """Set one gauge; without a Ray session nothing happens."""
        # A process that has not imported Ray has no session, and the import would take a second.
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        if series.name not in self._gauges:
            from ray.util.metrics import Gauge

            self._gauges[series.name] = Gauge(
                series.name, description=series.name, tag_keys=series.label_names
            )
        self._gauges[series.name].set(float(value), dict(series.labels))


class RunGauges:
    """A run in Prometheus, for the length of a `with` block that lies within Ray's session.

    A tracker (observe.trackers) of the run's metrics; beside them it shows how far each stage is,
    what was run, and what the pools hold.
    """

    def __init__(self, config: RunConfig, *, report: Path, gauges: Gauges | None = None) -> None:
        """report: where the run's report will stand.  gauges: None makes those of this process."""
        own = Gauges({"run": config.name, "node": node_address()}) if gauges is None else gauges
        self._gauges = own
        self._pools = config.pools.by_name
        self._ranks = {name: config.ranks_per_worker(name) for name in self._pools}
        own.set(Series.of("distill_run_info", **describe_run(config, report)), 1.0)

    def __enter__(self) -> Self:
        self._gauges.flush()
        self._gauges.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._gauges.close()

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics of one step of one stage."""
        for name, value in values.items():
            series = to_series(name)
            self._gauges.set(_with(series, stage=stage), value)
            if name in SUMMED:
                self._gauges.add(_with(SUMMED[name], stage=stage), value)
            if series.name == "distill_pool_workers":
                self._show_resources(dict(series.labels)["pool"], value)

    def truncate_after(self, stage: str, step: int) -> None:
        """See Tracker; there are no earlier values to take back."""

    def close(self) -> None:
        """See Tracker; the block ends it."""

    def show_progress(self, task: LiveTask) -> None:
        """Show how far a stage is; LiveView calls this whenever it hears of it."""
        shown = {
            "distill_step": float(task.step),
            "distill_total_steps": float(task.total_steps),
            "distill_stage_running": float(not task.is_finished),
            "distill_last_progress_time_seconds": time.time(),
        }
        if task.remaining_seconds is not None:
            shown["distill_remaining_seconds"] = task.remaining_seconds
        for name, value in shown.items():
            self._gauges.set(Series.of(name, stage=task.stage), value)
        if task.stage == MAIN_STAGE and "evaluation" in self._pools:
            self._show_resources("evaluation", self._pools["evaluation"].count)

    def _show_resources(self, name: str, num_workers: float) -> None:
        """GPUs and CPUs that a pool of so many workers holds."""
        pool = self._pools.get(name)
        if pool is None:
            return
        count = (pool.count if name == LEARNER else num_workers) * self._ranks[name]
        self._gauges.set(Series.of("distill_pool_gpus", pool=name), count * pool.gpus)
        self._gauges.set(Series.of("distill_pool_cpus", pool=name), count * pool.cpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineGauges:
    """Shows the load of a generation engine from its own process; travels to the worker.

    Fits rollout.engine.LoadReport.
    """

    run: str
    pool: str
    refresh_seconds: float = REFRESH_SECONDS

    def start(self, worker: str, read_load: Callable[[], EngineLoad]) -> None:
        """Read and show the load every few seconds, until the process ends."""
        labels = {"run": self.run, "pool": self.pool, "worker": worker, "node": node_address()}
        gauges = Gauges(labels)
        threading.Thread(
            target=_watch_engine,
            args=(gauges, read_load, self.refresh_seconds),
            name="engine gauges",
            daemon=True,
        ).start()


def _watch_engine(gauges: Gauges, read_load: Callable[[], EngineLoad], seconds: float) -> None:
    rate = Rate()
    while True:
        for name, value in describe_load(read_load(), rate, time.monotonic()).items():
            gauges.set(Series.of(f"distill_engine_{name}"), value)
        gauges.flush()
        time.sleep(seconds)


class Rate:
    """How fast a count grows between two looks at it."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def update(self, count: float, now: float) -> float:
        """Per second since the look before; 0 at the first, and where the count fell."""
        last, self._last = self._last, (count, now)
        if last is None or now <= last[1]:
            return 0.0
        return max(0.0, count - last[0]) / (now - last[1])


def describe_load(load: EngineLoad, rate: Rate, now: float) -> dict[str, float]:
    """An engine's load by the names of its series, without distill_engine_."""
    shown = {
        "running": float(load.running),
        "waiting": float(load.waiting),
        "written_tokens": float(load.written_tokens),
        "tokens_per_second": rate.update(load.written_tokens, now),
        "weight_version": float(load.version),
    }
    return shown if load.cache_use is None else {**shown, "cache_use": load.cache_use}


def node_address() -> str:
    """The address under which Ray knows this process's node; empty outside of a session."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    return str(ray.util.get_node_ip_address())


def describe_run(config: RunConfig, report: Path) -> dict[str, str]:
    """What is run, as labels of one series."""
    paths = {role: getattr(config, role).path or "made by the run" for role in MODELS}
    facts = {"version": __version__, "objective": config.distill.objective.type}
    return {**facts, **paths, "report": str(report.absolute())}


def _with(series: Series, **labels: str) -> Series:
    return Series.of(series.name, **{**dict(series.labels), **labels})
