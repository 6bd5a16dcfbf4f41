"""The costs of a run: its timings and metrics in, seconds, tokens and bytes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill_system.observe.metrics import MetricRow
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.timings import read_timings

STAGE = "distill"
PEAK_MEMORY = "peak_memory_bytes"
SAMPLED_TOKENS = ("sampled_tokens/student", "sampled_tokens/teacher")


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The costs of distillation; one that was not recorded is None.

    stage_seconds: wall clock of the whole stage, evaluations included.
    step_seconds: wall clock of the steps alone.
    sampled_tokens: response tokens that student and teacher generated for training.
    learner_tokens: response tokens that the learner read, of both streams.
    peak_memory_bytes: kind of worker (learner) -> the largest peak of one worker.
    """

    stage_seconds: float | None
    step_seconds: float | None
    sampled_tokens: float | None
    learner_tokens: float | None
    peak_memory_bytes: Mapping[str, float]

    def named(self) -> dict[str, float]:
        """The recorded costs by name; names end in their unit."""
        values = {
            "step_seconds": self.step_seconds,
            "stage_seconds": self.stage_seconds,
            "sampled_tokens": self.sampled_tokens,
            "learner_tokens": self.learner_tokens,
            **{f"{kind}_{PEAK_MEMORY}": value for kind, value in self.peak_memory_bytes.items()},
        }
        return {name: value for name, value in values.items() if value is not None}


def read_costs(run: RunDirectory, rows: Sequence[MetricRow]) -> Costs:
    """The costs of one run.

    Args:
        run: the folder with its timings.json.
        rows: the metrics of its distillation, each step once.

    Raises:
        RunStateError: a file exists and cannot be read.
    """
    stage_seconds = read_timings(run).seconds.get(STAGE)
    return Costs(
        stage_seconds=stage_seconds,
        step_seconds=_sum(rows, "seconds/step"),
        sampled_tokens=_sum(rows, *SAMPLED_TOKENS),
        learner_tokens=_sum(rows, "learner/response_tokens"),
        peak_memory_bytes=_find_peaks(rows),
    )


def _find_peaks(rows: Sequence[MetricRow]) -> dict[str, float]:
    peaks: dict[str, float] = {}
    for row in rows:
        for name, value in row.metrics.items():
            kind, _, what = name.partition("/")
            if what == PEAK_MEMORY and value is not None:
                peaks[kind] = max(value, peaks.get(kind, 0.0))
    return peaks


def _sum(rows: Sequence[MetricRow], *metrics: str) -> float | None:
    found = [row.metrics.get(metric) for row in rows for metric in metrics]
    values = [value for value in found if value is not None]
    return sum(values) if values else None
