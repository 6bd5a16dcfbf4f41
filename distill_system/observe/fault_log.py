"""What went wrong in a run and was survived: a line for each event, in faults.jsonl."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distill_system.observe.json_lines import JsonLinesLog, read_rows
from distill_system.observe.run_directory import RunDirectory
from distill_system.observe.run_writes import RunWrites

Event = Literal["lost", "replaced", "restarted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRow:
    """One line of faults.jsonl.

    step: steps done when it happened.  worker: pool-id of the worker that was lost.
    event: lost; replaced, by another worker; restarted, with all ranks of the learner from a
        checkpoint.
    cause: why it was lost, or who has taken its place.
    seconds: from the loss until the other could work; None where it is no such event.
    steps_again: of a restart, the steps that are made again.
    """

    time: float
    stage: str
    step: int
    worker: str
    event: Event
    cause: str
    seconds: float | None = None
    steps_again: int = 0


class FaultLog(JsonLinesLog[FaultRow]):
    """Writes one line per event, and counts the lost workers of each pool.

    pools: those whose losses are counted.  step: steps done, which the driver keeps up to date.
    """

    def __init__(
        self,
        run: RunDirectory,
        stage: str,
        pools: Iterable[str],
        *,
        writes: RunWrites | None = None,
    ) -> None:
        super().__init__(run.faults_path, FaultRow, writes=writes)
        self.step = 0
        self._stage = stage
        self._counts = Counter(dict.fromkeys(pools, 0))

    def lose(self, worker: str, cause: str) -> None:
        """A worker is lost."""
        self._counts[worker.rpartition("-")[0]] += 1
        self._log(worker, "lost", cause)

    def replace(self, worker: str, successor: str, seconds: float) -> None:
        """Another worker has taken its place."""
        self._log(worker, "replaced", successor, seconds=seconds)

    def restart(self, worker: str, seconds: float, *, first: int) -> None:
        """The learner has started anew, and goes on after `first` steps."""
        again = self.step - first
        self._log(worker, "restarted", f"after step {first}", seconds=seconds, steps_again=again)

    def metrics(self) -> Mapping[str, float]:
        """Workers that each pool has lost since this process began."""
        return {f"faults/{pool}": float(count) for pool, count in self._counts.items()}

    def _log(self, worker: str, event: Event, cause: str, **followed: Any) -> None:
        """followed: the row's seconds and steps_again, where there are any."""
        self.append(
            FaultRow(
                time=time.time(),
                stage=self._stage,
                step=self.step,
                worker=worker,
                event=event,
                cause=cause,
                **followed,
            )
        )


def read_faults(run: RunDirectory) -> list[FaultRow]:
    """All lines in the order written; see read_rows.  Raises: RunStateError."""
    return read_rows(run.faults_path, FaultRow)


@dataclass(frozen=True, slots=True)
class ToldFault:
    """A loss as a person is told of it: where, of whom, why, and what was done."""

    stage: str
    step: int
    worker: str
    cause: str
    done: str


def tell_faults(rows: Sequence[FaultRow]) -> list[ToldFault]:
    """A line for each loss, with what followed it; "" where nothing did before the run ended."""
    told = []
    for at, row in enumerate(rows):
        if row.event == "lost":
            after = (other for other in rows[at:] if _answers(row, other))
            first_line = row.cause.partition("\n")[0]
            done = next(map(_tell_end, after), "")
            told.append(ToldFault(row.stage, row.step, row.worker, first_line, done))
    return told


def _answers(lost: FaultRow, row: FaultRow) -> bool:
    """Whether a row says what became of a loss; ranks start anew together."""
    if row.event == "replaced":
        return row.worker == lost.worker
    return (
        row.event == "restarted" and row.worker.rpartition("-")[0] == lost.worker.rpartition("-")[0]
    )


def _tell_end(row: FaultRow) -> str:
    seconds = f"after {row.seconds or 0.0:.1f} s"
    if row.event == "replaced":
        return f"replaced by {row.cause} {seconds}"
    return f"all ranks anew {seconds}, {row.steps_again} steps made again"
