"""Every metric of every step: to a JSONL file, to TensorBoard, and to Ray's Prometheus endpoint."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from distill_system.observe.json_lines import JsonLinesLog, read_rows
from distill_system.observe.optional_writes import OptionalWrites
from distill_system.observe.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FIELDS = "time, stage, step and metrics"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One line of metrics.jsonl.  A value that was not finite is read as None."""

    time: float
    stage: str
    step: int
    metrics: dict[str, float | None]


class MetricLog:
    """Writes one row per call; safe to share among threads; see JsonLinesLog for resume."""

    def __init__(
        self, run: RunDirectory, *, run_name: str, writes: OptionalWrites | None = None
    ) -> None:
        self._run = run
        self._run_name = run_name
        self._writes = writes or OptionalWrites()
        self._lock = threading.Lock()
        self._writers: dict[str, SummaryWriter] = {}
        self._purge_steps: dict[str, int] = {}
        self._gauges: dict[str, Any] = {}
        self._rows = JsonLinesLog(
            run.metrics_path, MetricRow, expected=_FIELDS, writes=self._writes
        )

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step of one stage everywhere.

        Args:
            stage: sft_teacher, sft_student or distill.
            step: optimizer step of that stage.
            metrics: name (room/what_unit, see docs/metrics.md) -> value. NaN and infinities are
                null in the file, which JSON requires, and themselves elsewhere.
        """
        values = {name: float(value) for name, value in metrics.items()}
        with self._lock:
            self._rows.append(
                MetricRow(time=time.time(), stage=stage, step=step, metrics={**values})
            )
            told = partial(self._log_to_tensorboard, stage, step, values)
            if not self._writes.attempt("tensorboard/", told):
                self._writers.pop(stage, None)  # another file is begun once the disk takes it
            self._log_to_ray(stage, values)

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop the rows of this stage whose step is later, from the file and from TensorBoard."""
        with self._lock:
            self._rows.truncate_after(stage, step)
            self._purge_steps[stage] = step + 1
            writer = self._writers.pop(stage, None)
            if writer is not None:
                writer.close()

    def close(self) -> None:
        """Flush and close all files."""
        with self._lock:
            self._rows.close()
            for writer in self._writers.values():
                self._writes.attempt("tensorboard/", writer.close)
            self._writers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _log_to_tensorboard(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._writers:
            self._writers[stage] = self._open_writer(stage)
        for name, value in values.items():
            self._writers[stage].add_scalar(f"{stage}/{name}", value, step)

    def _open_writer(self, stage: str) -> SummaryWriter:
        # Imported here: it takes seconds, and a process that only reads metrics does not need it.
        from torch.utils.tensorboard import SummaryWriter

        # purge_step makes TensorBoard hide all later steps of a folder. Each stage counts its
        # steps from 0, so with one folder, purging one stage would hide steps of another.
        folder = self._run.tensorboard_directory / stage
        purge_step = self._purge_steps.pop(stage, None)
        return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)

    def _log_to_ray(self, stage: str, values: Mapping[str, float]) -> None:
        # A process that has not imported Ray has no session, and the import would take a second.
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
    """learner/loss -> distill_learner_loss: Prometheus allows letters, digits and underscores."""
    return "distill_" + re.sub(r"[^A-Za-z0-9]", "_", metric)


def read_metrics(run: RunDirectory) -> list[MetricRow]:
    """All rows in the order written; see read_rows.

    Raises:
        RunStateError: a line is not a row; the message says which.
    """
    return read_rows(run.metrics_path, MetricRow, expected=_FIELDS)
