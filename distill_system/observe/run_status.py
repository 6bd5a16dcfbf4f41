"""How a run stands, read from its folder alone: by whoever reaches the folder, while it goes on.

A folder in -> a few lines: stage, step, what is left, pools, last scores, the driver's last word.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from distill_system.errors import RunStateError
from distill_system.logs import DRIVER, last_message, log_path
from distill_system.observe.live import format_duration, format_number
from distill_system.observe.metrics import MetricRow, read_metrics
from distill_system.observe.recorded import read_config, read_pool_sizes
from distill_system.observe.run_directory import RunDirectory

RECENT_STEPS = 20
"""Steps from whose time the rest is reckoned."""

_SHOWN = ("held_out/", "evaluation/")

_LOSS = "learner/loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """A stage that has begun.

    step, steps: done, and in all.  remaining_seconds: None where there is nothing to reckon from.
    idle_seconds: since the last step was written.
    """

    name: str
    step: int
    steps: int
    remaining_seconds: float | None
    idle_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run as its folder has it.

    is_alive: whether some process writes there.  is_done: whether the student is exported.
    pools: pool -> workers present and wanted.  scores: the newest measured values by name.
    note: what the driver said last.
    """

    name: str
    folder: Path
    is_alive: bool
    is_done: bool
    stage: StageStatus | None
    pools: Mapping[str, tuple[int, int]]
    scores: Mapping[str, float]
    note: str


def find_runs(runs_directory: Path) -> list[RunDirectory]:
    """The runs below a folder, the newest work first."""
    runs = [RunDirectory(path.parent) for path in runs_directory.glob("*/config.json")]
    return sorted(runs, key=_last_change, reverse=True)


def find_stages(run: RunDirectory) -> list[RunDirectory]:
    """The runs of a curriculum's stages that have begun, in order; none of an ordinary run."""
    found = [RunDirectory(path.parent) for path in run.path.glob("[0-9]*_*/config.json")]
    return sorted(found, key=lambda stage: int(stage.path.name.partition("_")[0]))


def find_run(name: str, runs_directory: str) -> RunDirectory:
    """The folder of a run, by path or name.  Raises: RunStateError if there is no such run."""
    with suppress(OSError, ValueError):  # a name that no file could have
        for path in (Path(name), Path(runs_directory) / name):
            run = RunDirectory(path)
            if run.config_path.exists():
                return run
    raise RunStateError(
        f"no run {name!r}: expected a run's folder, or the name of one below {runs_directory}/ "
        "(--runs-directory); a run has a config.json"
    )


def read_status(run: RunDirectory, *, is_alive: bool, now: float | None = None) -> RunStatus:
    """How a run stands.

    is_alive: whether its lock is held.  now: seconds since the epoch.
    Raises: RunStateError if the folder holds no run, or a file of it cannot be read.
    """
    if not run.config_path.exists():
        raise RunStateError(f"{run.config_path} is missing: is {run.path} a run's folder?")
    config = read_config(run)
    rows = read_metrics(run)
    return RunStatus(
        name=str(config.get("name", run.path.name)),
        folder=run.path,
        is_alive=is_alive,
        is_done=run.student_directory.exists(),
        stage=_stage(config, rows, time.time() if now is None else now),
        pools=_pools(run),
        scores=_scores(rows),
        note=last_message(log_path(run.logs_directory, DRIVER)),
    )


def describe_status(status: RunStatus) -> Iterator[str]:
    """The lines that a person reads; the first one says it all in short."""
    yield f"{status.name}: {_in_short(status)}"
    yield f"    folder: {status.folder}"
    if status.pools and status.is_alive:
        pools = (
            f"{name} x{present}" + (f" (of {wanted})" if present != wanted else "")
            for name, (present, wanted) in status.pools.items()
        )
        yield f"    pools: {', '.join(pools)}"
    if status.scores:
        scores = (f"{name} {format_number(value)}" for name, value in status.scores.items())
        yield f"    last scores: {', '.join(scores)}"
    if status.note:
        yield f"    last note: {status.note}"


def _in_short(status: RunStatus) -> str:
    state = "done" if status.is_done else ("running" if status.is_alive else "not running")
    if status.is_done and status.is_alive:
        state = "distilled, still running"
    stage = status.stage
    if stage is None:
        return f"{state}, no step yet"
    text = f"{state}, {stage.name} step {stage.step}/{stage.steps}"
    if status.is_alive and not status.is_done:
        if stage.remaining_seconds is not None:
            text += f", ETA {format_duration(stage.remaining_seconds)}"
        text += f", last step {format_duration(stage.idle_seconds)} ago"
    return text


def _stage(config: Mapping[str, Any], rows: Sequence[MetricRow], now: float) -> StageStatus | None:
    if not rows:
        return None
    last = rows[-1]
    own = [row for row in rows if row.stage == last.stage]
    # A fine-tuning's rows are numbered from 0, by the step that they describe.
    done = last.step if last.stage == "distill" else last.step + 1
    steps = _steps(config, last.stage) or done
    recent = own[-RECENT_STEPS - 1 :]
    # The median: between two lives of a run lie hours that are no step's.
    times = [after.time - before.time for before, after in pairwise(recent)]
    left = max(0, steps - done) * median(times) if times else None
    return StageStatus(
        name=last.stage,
        step=done,
        steps=steps,
        remaining_seconds=left,
        idle_seconds=max(0.0, now - last.time),
    )


def _steps(config: Mapping[str, Any], stage: str) -> int:
    """All steps of a stage; 0 where the configuration does not say."""
    if stage == "distill":
        found = config.get("distill", {})
    else:
        found = config.get(stage.removeprefix("sft_"), {}).get("sft") or {}
    return int(found.get("steps", 0))


def _pools(run: RunDirectory) -> dict[str, tuple[int, int]]:
    pools = read_pool_sizes(run).items()
    return {name: (pool["present"], pool["wanted"]) for name, pool in pools}


def _scores(rows: Sequence[MetricRow]) -> dict[str, float]:
    """The newest value of everything that is measured now and then, and the last loss."""
    newest: dict[str, float] = {}
    for row in rows:
        for name, value in row.metrics.items():
            if value is not None and (name.startswith(_SHOWN) or name == _LOSS):
                newest[name] = value
    return newest


def _last_change(run: RunDirectory) -> float:
    files = (run.metrics_path, run.config_path)
    return max(path.stat().st_mtime for path in files if path.exists())
