"""How a run stands, read from its folder alone: by whoever reaches the folder, while it goes on.

A folder in -> a few lines: stage, step, what is left, pools, last scores, the driver's last word.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
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


def describe_status(run: RunDirectory, *, is_alive: bool, now: float | None = None) -> list[str]:
    """The lines that a person reads of a run; the first one says it all in short.

    is_alive: whether its lock is held.  now: seconds since the epoch.
    Raises: RunStateError if the folder holds no run, or a file of it cannot be read.
    """
    if not run.config_path.exists():
        raise RunStateError(f"{run.config_path} is missing: is {run.path} a run's folder?")
    config, rows, pools = read_config(run), read_metrics(run), read_pool_sizes(run)
    is_done = run.student_directory.exists()
    state = "done" if is_done else ("running" if is_alive else "not running")
    if is_done and is_alive:
        state = "distilled, still running"
    stage = _describe_stage(config, rows, time.time() if now is None else now)
    shown = stage if is_alive and not is_done else stage[:1]  # what is left is left to the living
    lines = [f"{config.get('name', run.path.name)}: {', '.join([state, *shown])}"]
    lines.append(f"    folder: {run.path}")
    if is_alive and pools:
        lines.append(f"    pools: {', '.join(_describe_pool(*pool) for pool in pools.items())}")
    if scores := _scores(rows):
        named = (f"{name} {format_number(value)}" for name, value in scores.items())
        lines.append(f"    last scores: {', '.join(named)}")
    if note := last_message(log_path(run.logs_directory, DRIVER)):
        lines.append(f"    last note: {note}")
    return lines


def _describe_pool(name: str, sizes: Mapping[str, int]) -> str:
    of = f" (of {sizes['wanted']})" if sizes["present"] != sizes["wanted"] else ""
    return f"{name} x{sizes['present']}{of}"


def _describe_stage(config: Mapping[str, Any], rows: Sequence[MetricRow], now: float) -> list[str]:
    """Stage and step of the newest row, the rest by the time of recent steps, and its age."""
    if not rows:
        return ["no step yet"]
    last = rows[-1]
    recent = [row.time for row in rows if row.stage == last.stage][-RECENT_STEPS - 1 :]
    # A fine-tuning's rows are numbered from 0, by the step that they describe.
    done = last.step if last.stage == "distill" else last.step + 1
    steps = _steps(config, last.stage) or done
    # The median: between two lives of a run lie hours that are no step's.
    times = [after - before for before, after in pairwise(recent)]
    left = [f"ETA {format_duration(max(0, steps - done) * median(times))}"] if times else []
    idle = f"last step {format_duration(max(0.0, now - last.time))} ago"
    return [f"{last.stage} step {done}/{steps}", *left, idle]


def _steps(config: Mapping[str, Any], stage: str) -> int:
    """All steps of a stage; 0 where the configuration does not say."""
    if stage == "distill":
        found = config.get("distill", {})
    else:
        found = config.get(stage.removeprefix("sft_"), {}).get("sft") or {}
    return int(found.get("steps", 0))


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
