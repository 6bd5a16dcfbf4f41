"""JSON-lines files of a run: one row per step, appended while others read.

In: rows that are dataclasses with a stage and a step.  Out: one JSON object a line; and back.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from distill_system.errors import RunStateError
from distill_system.observe.run_directory import drop_half_line, without_non_finite, write_text


class StepRow(Protocol):
    """A row that belongs to one step of one stage."""

    @property
    def stage(self) -> str:
        """sft_teacher, sft_student or distill."""

    @property
    def step(self) -> int:
        """Steps of that stage done."""


Row = TypeVar("Row", bound=StepRow)


class JsonLinesLog(Generic[Row]):
    """Appends rows to a file; safe to share among threads.

    Opening drops a last line that a crash left half-written. On resume, call truncate_after with
    the checkpoint's step, so that no step stands in the file twice.
    """

    def __init__(self, path: Path, kind: type[Row], *, expected: str) -> None:
        """kind, expected: see read_rows."""
        self._path = path
        self._kind = kind
        self._expected = expected
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_half_line(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Write a row; NaN and infinities, which JSON lacks, become null."""
        with self._lock:
            self._file.write(_to_line(row))
            self._file.flush()

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop the rows of this stage whose step is later."""
        with self._lock:
            self._file.close()
            rows = read_rows(self._path, self._kind, expected=self._expected)
            kept = [row for row in rows if row.stage != stage or row.step <= step]
            write_text(self._path, "".join(map(_to_line, kept)))
            self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_rows(path: Path, kind: type[Row], *, expected: str) -> list[Row]:
    """Each line as a `kind`, in the order written; none if there is no such file yet.

    A last line without a newline is left out: a running process may still be writing it.

    Args:
        expected: the fields of a line, for the message.

    Raises:
        RunStateError: another line is not a row; the message says which.
    """
    if not path.exists():
        return []
    *lines, _half = path.read_text(encoding="utf-8").split("\n")
    return [_to_row(path, kind, n, line, expected) for n, line in enumerate(lines, start=1)]


def _to_line(row: Any) -> str:
    return json.dumps(without_non_finite(asdict(row)), allow_nan=False, ensure_ascii=False) + "\n"


def _to_row(path: Path, kind: type[Row], number: int, line: str, expected: str) -> Row:
    try:
        return kind(**json.loads(line))
    except (json.JSONDecodeError, TypeError) as error:
        raise RunStateError(
            f"{path}, line {number}: expected an object with {expected}, got {line[:80]!r}; delete "
            "that line"
        ) from error
