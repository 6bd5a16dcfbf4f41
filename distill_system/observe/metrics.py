"""What is kept of every step: its metrics, in a JSONL file and in trackers, and its prompts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from distill_system.config.run import TrackerName
from distill_system.observe.json_lines import JsonLinesLog, read_rows
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.run_writes import RunWrites
from distill_system.observe.trackers import Tracker, open_trackers


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRow:
    """One line of metrics.jsonl.  A value that was not finite is read as None."""

    time: float
    stage: str
    step: int
    metrics: dict[str, float | None]


class MetricLog(JsonLinesLog[MetricRow]):
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
        self._trackers_lock = threading.Lock()
        self._trackers = open_trackers(trackers, run, run_name, notify=notify)
        super().__init__(run.metrics_path, MetricRow, writes=writes)

    def add_tracker(self, name: str, tracker: Tracker) -> None:
        """Tell this one too, of what is still to come."""
        with self._trackers_lock:
            self._trackers.add(name, tracker)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step of one stage everywhere.

        stage: sft_teacher, sft_student or distill.
        step: optimizer step of that stage.
        metrics: name (room/what_unit, see docs/metrics.md) -> value. NaN and infinities are
            null in the file, which JSON requires, and themselves elsewhere.
        """
        values = {name: float(value) for name, value in metrics.items()}
        with self._trackers_lock:
            self.append(MetricRow(time=time.time(), stage=stage, step=step, metrics={**values}))
            self._trackers.log(stage, step, values)

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop the rows of this stage whose step is later, from the file and from TensorBoard."""
        with self._trackers_lock:
            super().truncate_after(stage, step)
            self._trackers.truncate_after(stage, step)

    def close(self) -> None:
        """Flush and close all files."""
        with self._trackers_lock:
            super().close()
            self._trackers.close()


def read_metrics(run: RunDirectory) -> list[MetricRow]:
    """All rows in the order written; see read_rows.  Raises: RunStateError."""
    return read_rows(run.metrics_path, MetricRow)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedPrompts:
    """One line of prompts.jsonl: the prompt ids of each stream that the step learned from."""

    stage: str
    step: int
    prompt_ids: dict[str, list[str]]


class PromptLog(JsonLinesLog[TrainedPrompts]):
    """Writes one line per call to prompts.jsonl; see JsonLinesLog for resume and threads."""

    def __init__(self, run: RunDirectory, *, writes: RunWrites | None = None) -> None:
        super().__init__(run.prompts_path, TrainedPrompts, writes=writes)

    def log(self, stage: str, step: int, prompt_ids: Mapping[str, Sequence[str]]) -> None:
        """Write what a step of a stage was trained on.

        stage: sft_teacher, sft_student or distill.
        step: as in metrics.jsonl.
        prompt_ids: stream -> ids, in the order of the batch; streams without any are left out.
        """
        used = {stream: list(ids) for stream, ids in prompt_ids.items() if ids}
        self.append(TrainedPrompts(stage=stage, step=step, prompt_ids=used))


def read_prompts(run: RunDirectory) -> list[TrainedPrompts]:
    """All lines in the order written; see read_rows.  Raises: RunStateError."""
    return read_rows(run.prompts_path, TrainedPrompts)
