"""Keeps the records of a set: in memory, or above a size in a file, of which rows are mapped.

In: prompts or trajectories, a few thousand at a time.  Out: a sequence of them. The file is removed
from its folder as soon as it is mapped, so that nothing is left behind however a run ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow
import pyarrow.compute as pc
import pyarrow.ipc

from distill_system.data.stored_rows import (
    TRAJECTORY_SCHEMA,
    read_trajectory,
    trajectory_columns,
)
from distill_system.errors import DataError
from distill_system.records import Prompt, Trajectory

ROWS_PER_BATCH = 4096
BYTES_PER_RECORD = 600
"""About what Python's objects around a record's tokens and text take."""

Record = TypeVar("Record", Prompt, Trajectory)

PROMPT_SCHEMA = pyarrow.schema(
    [
        ("prompt_id", pyarrow.string()),
        ("token_ids", pyarrow.list_(pyarrow.int32())),
        ("text", pyarrow.string()),
        ("references", pyarrow.list_(pyarrow.string())),
        ("source", pyarrow.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class RecordForm(Generic[Record]):
    """How records of one type stand in an Arrow table.

    columns: records -> the values of each column.  read: (batch, row) -> the record.
    """

    schema: pyarrow.Schema
    columns: Callable[[Sequence[Record]], dict[str, list[object]]]
    read: Callable[[pyarrow.RecordBatch, int], Record]


class MappedRecords(Sequence[Record], Generic[Record]):
    """Records in a file, each made when it is asked for; their arrays are views of the file.

    Memory holds what the operating system keeps of the file, and gives it up where it is short.
    """

    def __init__(
        self, form: RecordForm[Record], batches: Sequence[pyarrow.RecordBatch], num_bytes: int
    ) -> None:
        self._form: RecordForm[Record] = form
        self._batches = batches
        self._length = sum(batch.num_rows for batch in batches)
        self.num_bytes = num_bytes

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]  # negative ones count from the end
        batch, row = divmod(at, ROWS_PER_BATCH)
        return self._form.read(self._batches[batch], row)

    def column(self, name: str) -> pyarrow.ChunkedArray:
        """One column of all records."""
        return pyarrow.chunked_array([batch.column(name) for batch in self._batches])


class RecordKeeper(Generic[Record]):
    """Takes the records of one set, and hands them out as one sequence.

    form: PROMPTS or TRAJECTORIES.
    most_bytes: more than this goes to a file.
    folder: where the file is made; it must not lie in memory.
    """

    def __init__(self, form: RecordForm[Record], *, most_bytes: int, folder: Path) -> None:
        self._form: RecordForm[Record] = form
        self._most_bytes = most_bytes
        self._folder = folder
        self._records: list[Record] = []
        self._num_bytes = 0
        self._file: _RecordFile | None = None

    def add(self, records: Iterable[Record]) -> None:
        """Take some more.  Raises: DataError if the file cannot be written."""
        for record in records:
            self._records.append(record)
            self._num_bytes += BYTES_PER_RECORD + 4 * len(record.token_ids)
            self._num_bytes += len(getattr(record, "text", ""))
        if self._num_bytes > self._most_bytes or self._file is not None:
            self._write(ROWS_PER_BATCH)

    def finish(self) -> Sequence[Record]:
        """All records in order: a tuple, or MappedRecords."""
        if self._file is None:
            return tuple(self._records)
        self._write(1)
        return self._file.map(self._form)

    def _write(self, at_least: int) -> None:
        """Move records to the file in batches of ROWS_PER_BATCH, the last of which may be less."""
        if self._file is None:
            self._file = _RecordFile(self._folder, self._form.schema)
        while len(self._records) >= at_least:
            rows = self._records[:ROWS_PER_BATCH]
            del self._records[:ROWS_PER_BATCH]
            self._file.write(pyarrow.record_batch(self._form.columns(rows), self._form.schema))


class _RecordFile:
    """An Arrow file with a random name."""

    def __init__(self, folder: Path, schema: pyarrow.Schema) -> None:
        self._folder = folder
        with _naming(self._folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed once it is mapped
                dir=folder, prefix="rows-", suffix=".arrow"
            )
            self._writer = pyarrow.ipc.new_file(self._file, schema)

    def write(self, batch: pyarrow.RecordBatch) -> None:
        with _naming(self._folder):
            self._writer.write_batch(batch)

    def map(self, form: RecordForm[Any]) -> MappedRecords[Any]:
        """Close the file, map it, and remove its name: it lasts as long as it is mapped."""
        with _naming(self._folder):
            self._writer.close()
            self._file.flush()
            mapped = pyarrow.memory_map(self._file.name)
            reader = pyarrow.ipc.open_file(mapped)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            self._file.close()
        return MappedRecords(form, batches, mapped.size())


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into one message that names the folder."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: a set larger than data.max_memory_mebibytes goes to a file here, which "
            f"cannot be written: {error}. Make room, or give data.cache_directory"
        ) from error


def count_sources(prompts: Sequence[Prompt]) -> dict[str, int] | None:
    """Prompts of each source, read from the file alone; None for prompts in memory."""
    if not isinstance(prompts, MappedRecords):
        return None
    counts: dict[str, int] = {}
    for batch in prompts.column("source").chunks:
        for pair in pc.value_counts(batch).to_pylist():
            counts[pair["values"]] = counts.get(pair["values"], 0) + pair["counts"]
    return counts


def longest_row(rows: Sequence[Trajectory]) -> Trajectory | None:
    """The first row with the most tokens; None if there is none."""
    if isinstance(rows, MappedRecords):
        lengths = pc.list_value_length(rows.column("token_ids")).to_numpy()
        return rows[int(np.argmax(lengths))]
    return max(rows, key=lambda row: row.token_ids.size, default=None)


def _prompt_columns(prompts: Sequence[Prompt]) -> dict[str, list[object]]:
    return {name: [getattr(prompt, name) for prompt in prompts] for name in PROMPT_SCHEMA.names}


def _read_prompt(batch: pyarrow.RecordBatch, row: int) -> Prompt:
    return Prompt(
        prompt_id=batch.column("prompt_id")[row].as_py(),
        token_ids=batch.column("token_ids")[row].values.to_numpy(),
        text=batch.column("text")[row].as_py(),
        references=tuple(batch.column("references")[row].as_py()),
        source=batch.column("source")[row].as_py(),
    )


PROMPTS = RecordForm(PROMPT_SCHEMA, _prompt_columns, _read_prompt)
TRAJECTORIES = RecordForm(TRAJECTORY_SCHEMA, trajectory_columns, read_trajectory)
