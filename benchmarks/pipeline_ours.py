"""Our side of benchmarks/pipeline.py: a run of the command line, read from what it wrote down."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline_models import Workload, write_configuration

from distill_system.observe import RunDirectory
from distill_system.observe.metrics import MetricRow, read_metrics

DRAIN = 4
"""Steps at the end that do not count: the streams run out of prompts to give out."""
OVERRIDING = ("OMP_NUM_THREADS", "RAY_ADDRESS")
"""What would overrule the configuration, or the machine that is measured."""


@dataclass(frozen=True)
class OurSetting:
    """How far the student's text may lag behind, and how two cores are shared out.

    threads: of the scorer and of the learner; the engine's work is mostly vLLM's own Python.
    """

    max_staleness: int
    threads: int
    student_rollouts: int = 1

    @property
    def name(self) -> str:
        """As the table names it."""
        form = f"ours, S = {self.max_staleness}, {self.threads} threads"
        more = f", {self.student_rollouts} rollout workers"
        return form + (more if self.student_rollouts > 1 else "")

    @property
    def configuration(self) -> dict[str, Any]:
        """Keys of the run's configuration."""
        return {
            "distill.staleness": {"max_staleness": self.max_staleness},
            "scoring.threads": self.threads,
            "learner.threads": self.threads,
            "pools.student_rollout.count": self.student_rollouts,
        }


@dataclass
class Steps:
    """What some counted steps took: for each its seconds, response tokens, and seconds of parts;
    and the share of its responses that ended before the longest length."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Of all counted steps together."""
        return sum(self.tokens) / sum(self.seconds)


def run(folder: Path, models: Path, workload: Workload, setting: OurSetting) -> Steps:
    """One whole run in processes of its own; its folder is gone afterwards.

    Raises: RuntimeError with what the run said, if it failed.
    """
    path = folder / "run.yaml"
    write_configuration(path, models, workload, setting.configuration)
    environment = {key: value for key, value in os.environ.items() if key not in OVERRIDING}
    directory = RunDirectory(folder / path.stem)
    try:
        said = subprocess.run(
            [sys.executable, "-m", "distill_system", "distill", str(path)],
            env={**environment, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if said.returncode != 0:
            end = said.stderr[-4000:]
            raise RuntimeError(f"{setting.name}, {workload.lengths} lengths: {end}")
        rows = [row for row in read_metrics(directory) if row.stage == "distill"]
    finally:
        shutil.rmtree(directory.path, ignore_errors=True)
    return read_steps(rows, workload)


def read_steps(rows: Sequence[MetricRow], workload: Workload) -> Steps:
    """The steps between warm-up and drain, each from the end of the one before to its own."""
    steps = Steps()
    for before, row in pairwise(row for row in rows if row.step > 0):
        if not workload.warm_up < row.step <= workload.steps - DRAIN:
            continue
        metrics = {name: float(value or 0.0) for name, value in row.metrics.items()}
        steps.seconds.append(row.time - before.time)
        steps.tokens.append(round(metrics["learner/response_tokens"]))
        steps.ended.append(metrics["learner/student_ended_share"])
        steps.parts.append(
            {
                name.removeprefix("seconds/"): value
                for name, value in metrics.items()
                if name.startswith("seconds/") and name != "seconds/step"
            }
        )
    return steps
