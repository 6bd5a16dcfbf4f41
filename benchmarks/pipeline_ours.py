"""Our side of benchmarks/pipeline.py: a run of the command line, read from what it wrote down."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline_models import Workload, write_configuration

from distill_system.observe import RunDirectory
from distill_system.observe.metrics import MetricRow, read_metrics

DRAIN = 4
"""Steps at the end that do not count: the streams run out of prompts to give out."""


@dataclass(frozen=True)
class OurSetting:
    """How far the student's text may lag behind, and the threads of each worker."""

    max_staleness: int
    threads: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"ours, S = {self.max_staleness}"


@dataclass(frozen=True)
class Steps:
    """What some counted steps took: seconds and response tokens of each, and its parts."""

    seconds: list[float]
    tokens: list[int]
    parts: list[dict[str, float]]
    lengths: list[tuple[float, float]]
    """Mean and standard deviation of each step's lengths, where the system says them."""


def run(folder: Path, models: Path, workload: Workload, setting: OurSetting, name: str) -> Steps:
    """One whole run in processes of its own; its folder is gone afterwards.

    Raises: RuntimeError with what the run said, if it failed.
    """
    path = folder / f"{name}.yaml"
    write_configuration(path, models, workload, _settings(setting))
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS",)
    }
    said = subprocess.run(
        [sys.executable, "-m", "distill_system", "distill", str(path)],
        env={**environment, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    directory = RunDirectory(folder / name)
    if said.returncode != 0:
        raise RuntimeError(f"{setting.name} on {workload.lengths} lengths: {said.stderr[-4000:]}")
    rows = [row for row in read_metrics(directory) if row.stage == "distill"]
    shutil.rmtree(directory.path)
    return read_steps(rows, workload)


def _settings(setting: OurSetting) -> dict[str, Any]:
    return {
        "distill.staleness.max_staleness": setting.max_staleness,
        "rollout.student_engine.threads": setting.threads,
        "scoring.threads": setting.threads,
        "learner.threads": setting.threads,
        **setting.settings,
    }


def read_steps(rows: Sequence[MetricRow], workload: Workload) -> Steps:
    """The steps between warm-up and drain."""
    counted = [
        row.metrics for row in rows if workload.warm_up < row.step <= workload.steps - DRAIN
    ]
    seconds = [float(metrics["seconds/step"] or 0) for metrics in counted]
    return Steps(
        seconds=seconds,
        tokens=[
            round(s * float(metrics["tokens_per_second/step"] or 0))
            for s, metrics in zip(seconds, counted, strict=True)
        ],
        parts=[
            {
                name.removeprefix("seconds/"): float(value or 0)
                for name, value in metrics.items()
                if name.startswith("seconds/")
            }
            for metrics in counted
        ],
        lengths=[],
    )
