"""Every metric of every step: to a JSONL file, to TensorBoard, and to Ray's Prometheus endpoint."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distill_system.observe.json_lines import read_rows
from distill_system.observe.run_directory import (
    RunDirectory,
    drop_half_line,
    without_non_finite,
    write_text,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One line of metrics.jsonl.  A value that was not finite reads None."""

    time: float
    stage: str
    step: int
    metrics: dict[str, float | None]


class MetricLog:
    """Writes one row per call; threads may share it.

    Opening drops a last line that a crash left half-written.  On resume, call truncate_after with
    the checkpoint's step, so that no step stands in the history twice.
    """

    def __init__(self, run: RunDirectory, *, run_name: str) -> None:
        self._run = run
        self._run_name = run_name
        self._lock = threading.Lock()
        self._writers: dict[str, SummaryWriter] = {}
        self._purge_steps: dict[str, int] = {}
        self._gauges: dict[str, Any] = {}
        run.path.mkdir(parents=True, exist_ok=True)
        drop_half_line(run.metrics_path)
        self._file = run.metrics_path.open("a", encoding="utf-8")

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step of one stage everywhere.

        Args:
            stage: sft_teacher, sft_student or distill.
            step: optimizer step of that stage.
            metrics: name (room/what_unit, see docs/metrics.md) -> value; NaN and infinities are
                taken: null in the file, as they are elsewhere.
        """
        values = {name: float(value) for name, value in metrics.items()}
        row = {"time": time.time(), "stage": stage, "step": step, "metrics": values}
        with self._lock:
            self._file.write(json.dumps(without_non_finite(row), allow_nan=False) + "\n")
            self._file.flush()
            self._log_to_tensorboard(stage, step, values)
            self._log_to_ray(stage, values)

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop the rows of this stage whose step is later, from the file and from TensorBoard."""
        with self._lock:
            self._file.close()
            kept = [
                row for row in read_metrics(self._run) if row.stage != stage or row.step <= step
            ]
            write_text(self._run.metrics_path, "".join(_to_line(row) for row in kept))
            self._file = self._run.metrics_path.open("a", encoding="utf-8")
            self._purge_steps[stage] = step + 1
            writer = self._writers.pop(stage, None)
            if writer is not None:
                writer.close()

    def close(self) -> None:
        """Flush and close all files."""
        with self._lock:
            self._file.close()
            for writer in self._writers.values():
                writer.close()
            self._writers.clear()

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _log_to_tensorboard(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._writers:
            self._writers[stage] = self._open_writer(stage)
        for name, value in values.items():
            self._writers[stage].add_scalar(f"{stage}/{name}", value, step)

    def _open_writer(self, stage: str) -> SummaryWriter:
        # Imported here: it takes seconds, and who only reads metrics never needs it.
        from torch.utils.tensorboard import SummaryWriter

        # A folder per stage, since purging hides everything later in a folder and stages count
        # their steps by themselves.
        folder = self._run.tensorboard_directory / stage
        purge_step = self._purge_steps.pop(stage, None)
        return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def _log_to_ray(self, stage: str, values: Mapping[str, float]) -> None:
        # A process that never imported Ray has not initialised it; importing it costs a second.
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        tags = {"run": self._run_name, "stage": stage}
        for name, value in values.items():
            self._find_gauge(name).set(value, tags)

    def _find_gauge(self, name: str) -> Any:
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            gauge_name = to_gauge_name(name)
            self._gauges[name] = Gauge(gauge_name, description=name, tag_keys=("run", "stage"))
        return self._gauges[name]


def to_gauge_name(metric: str) -> str:
    """Prometheus takes letters, digits and underscores: learner/loss -> distill_learner_loss."""
    return "distill_" + re.sub(r"[^A-Za-z0-9]", "_", metric)


def read_metrics(run: RunDirectory) -> list[MetricRow]:
    """All rows in the order written; none if the run has no metrics yet.

    A last line without its end, as a run that is still writing has, is left out.

    Raises:
        RunStateError: another line is not a row; the message says which.
    """
    return read_rows(run.metrics_path, MetricRow, expected="time, stage, step and metrics")


def _to_line(row: MetricRow) -> str:
    fields = {"time": row.time, "stage": row.stage, "step": row.step, "metrics": row.metrics}
    return json.dumps(fields, allow_nan=False) + "\n"
