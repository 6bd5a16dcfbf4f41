"""JSON-lines files of a run: one row per step, appended while others read.

In: rows that are dataclasses with a stage and a step.  Out: one JSON object a line; and back.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from pydantic import TypeAdapter

from distill_system.observe.run_directory import (
    drop_half_line,
    parse_form,
    read_bytes_if_exists,
    told_as_unwritable,
    without_non_finite,
    write_text,
)
from distill_system.observe.run_writes import RunWrites


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
    the checkpoint's step, so that no step stands in the file twice. Rows that the disk does not
    take are kept in memory and written with a later one, or by `close`.
    """

    def __init__(self, path: Path, kind: type[Row], *, writes: RunWrites | None = None) -> None:
        """kind: of the rows.  writes: tells of writes that fail.

        Raises: RunStateError if the file cannot be opened.
        """
        self._path = path
        self._kind = kind
        self._writes = writes or RunWrites()
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._whole_bytes: int | None = None
        with told_as_unwritable(path):
            self._writes.require(path, self._open)

    def append(self, row: Row) -> None:
        """Write a row; NaN and infinities, which JSON lacks, become null."""
        line = _to_line(row).encode()
        with self._lock:
            self._waiting.append(line)
        self._writes.attempt(self._path.name, self._write_waiting)

    def truncate_after(self, stage: str, step: int) -> None:
        """Drop the rows of this stage whose step is later.

        Raises: RunStateError if the file cannot be read or written.
        """
        with told_as_unwritable(self._path):
            self._writes.require(self._path, partial(self._truncate, stage, step))

    def close(self) -> None:
        """Write what is still waiting, for the last time; says how many rows are lost."""
        if self._waiting:
            self._writes.attempt(self._path.name, self._write_waiting, is_last=True)
        with self._lock:
            if self._waiting:
                self._writes.notify(f"{self._path.name}: {len(self._waiting)} rows are lost")
            self._waiting.clear()

    # What follows is done by the thread of the run's writes alone, one after the other.

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        drop_half_line(self._path)
        self._path.open("ab").close()

    def _truncate(self, stage: str, step: int) -> None:
        self._write_waiting()
        rows = read_rows(self._path, self._kind)
        kept = [row for row in rows if row.stage != stage or row.step <= step]
        if len(kept) < len(rows):
            write_text(self._path, "".join(map(_to_line, kept)))

    def _write_waiting(self) -> None:
        """Append all waiting rows, or raise OSError and keep them.

        Opened for each write: a file of a network's file system may have to be found anew, and some
        of its errors come as it is closed.
        """
        with self._lock:
            lines = list(self._waiting)
        with self._path.open("ab", buffering=0) as file:
            if self._whole_bytes is not None and file.tell() > self._whole_bytes:
                file.truncate(self._whole_bytes)  # what a write that failed has left
            self._whole_bytes = os.fstat(file.fileno()).st_size
            left = memoryview(b"".join(lines))
            while left:
                left = left[file.write(left) :]
        with self._lock:
            del self._waiting[: len(lines)]
        self._whole_bytes = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Each line as a `kind`, in the order written; none if there is no such file yet.

    A last line without a newline is left out: a running process may still be writing it.

    Raises: RunStateError if the file cannot be read, or another line is not a row; it is named.
    """
    row: Any = kind
    *most, last = (field.name for field in fields(row))
    way_out = f"Expected a line with {', '.join(most)} and {last}: delete that line"
    text = read_bytes_if_exists(path, way_out="Mend that, or remove it")
    *lines, _half = (text or b"").split(b"\n")
    form = TypeAdapter(kind)
    return [
        parse_form(line, form, place=f"{path}, line {number}", way_out=way_out)
        for number, line in enumerate(lines, start=1)
    ]


def _to_line(row: Any) -> str:
    return json.dumps(without_non_finite(asdict(row)), allow_nan=False, ensure_ascii=False) + "\n"
