"""Every metric of every step: to a JSONL file, and to the trackers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from distill_system.config.run import TrackerName
from distill_system.observe.json_lines import JsonLinesLog, read_rows
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.run_writes import RunWrites
from distill_system.observe.trackers import Tracker, open_trackers

_FIELDS = "time, stage, step and metrics"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One line of metrics.jsonl.  A value that was not finite is read as None."""

    time: float
    stage: str
    step: int
    metrics: dict[str, float | None]


class MetricLog:
    """Writes one row per call; safe to share among threads; see JsonLinesLog for resume.

    run_name: the run's name in trackers.  trackers: who is told beside the file.
    notify: takes a line for the person, where a tracker fails.
    writes: tells of rows that the disk does not take.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        run_name: str,
        trackers: Sequence[TrackerName] = ("tensorboard",),
        notify: Callable[[str], None] = print,
        writes: RunWrites | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._trackers = open_trackers(trackers, run, run_name, notify=notify)
        self._rows = JsonLinesLog(run.metrics_path, MetricRow, expected=_FIELDS, writes=writes)

    def add_tracker(self, name: str, tracker: Tracker) -> None:
        """Tell this one too, of what is still to come."""
        with self._lock:
            self._trackers.add(name, tracker)

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
            self._trackers.log(stage, step, values)

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop the rows of this stage whose step is later, from the file and from TensorBoard."""
        with self._lock:
            self._rows.truncate_after(stage, step)
            self._trackers.truncate_after(stage, step)

    def close(self) -> None:
        """Flush and close all files."""
        with self._lock:
            self._rows.close()
            self._trackers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(run: RunDirectory) -> list[MetricRow]:
    """All rows in the order written; see read_rows.

    Raises:
        RunStateError: a line is not a row; the message says which.
    """
    return read_rows(run.metrics_path, MetricRow, expected=_FIELDS)
