"""Reads the examples of a source: files of rows, what `datasets` loads, and the embedded tasks.

In: a configured source.  Out: its examples. A row that cannot be used is an error that names the
file and the row, or is left out and counted where the source says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from distill_system.config.data import (
    DataConfig,
    DatasetsSource,
    EmbeddedSource,
    FieldMap,
    FilesSource,
    JsonlSource,
    ParquetSource,
    PreferenceFields,
    RowSource,
    Source,
)
from distill_system.config.templates import template_fields
from distill_system.data.datasets_rows import is_saved, load_dataset, load_saved
from distill_system.data.embedded_tasks import generate_tasks
from distill_system.data.examples import Example, read_example
from distill_system.data.layouts import find_layout, to_basic_row, told_layout
from distill_system.data.row_fields import (
    NeededFields,
    check_fields,
    lacks_text,
    needed_columns,
    needed_fields,
)
from distill_system.data.row_files import NamedRows, find_files
from distill_system.data.row_values import Row
from distill_system.errors import DataError

ROWS_LOOKED_AT = 100
"""Rows from which a layout is found."""
_CONTEXT = "data.teacher_context"
MOST_KEPT = 20
"""Refused rows of which the reason is kept; the others are counted."""


@dataclass(slots=True, kw_only=True)
class SourceReport:
    """What was read of a source, filled in while its examples are read.

    place: its file or files.  layout: e.g. "question -> answer"; unread: its other columns.
    num_rows: rows read, those left out included.  num_empty: left out by leave_out_empty.
    refused: the first MOST_KEPT reasons, each with its place; num_refused: all.
    num_mapped_bytes: length of the file that the tokenised rows went to; 0: they are in memory.
    """

    place: str = ""
    layout: str = ""
    unread: tuple[str, ...] = ()
    num_rows: int = 0
    num_examples: int = 0
    num_empty: int = 0
    num_refused: int = 0
    refused: list[str] = field(default_factory=list)
    num_mapped_bytes: int = 0

    def refuse(self, error: DataError) -> None:
        """Count a row that is left out because it cannot be used."""
        self.num_refused += 1
        if len(self.refused) < MOST_KEPT:
            self.refused.append(str(error))

    def take_back(self, error: DataError) -> None:
        """Count an example that was read and cannot be used after all."""
        self.num_examples -= 1
        self.refuse(error)

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{self.place}: {self.layout}" if self.layout else self.place]
        if self.unread:
            parts.append(f"not read: {', '.join(self.unread)}")
        parts.append(f"{self.num_examples} of {self.num_rows} rows")
        if self.num_empty:
            parts.append(f"{self.num_empty} empty ones left out")
        if self.num_refused:
            parts.append(f"{self.num_refused} refused ones left out, the first: {self.refused[0]}")
        if self.num_mapped_bytes:
            parts.append(f"kept in a file of {self.num_mapped_bytes / 2**20:.0f} MiB")
        return "; ".join(parts)


class _Table(Protocol):
    """A file or a loaded data set."""

    @property
    def name(self) -> str: ...
    def columns(self) -> list[str] | None: ...
    def rows(self, columns: Sequence[str] | None = None) -> NamedRows: ...


def load_examples(
    source: Source, data: DataConfig, *, key: str = "source", with_answers: bool = True
) -> list[Example]:
    """All examples of a source; see `read_examples`."""
    return list(read_examples(source, data, key=key, with_answers=with_answers))


def read_examples(
    source: Source,
    data: DataConfig,
    *,
    key: str = "source",
    with_answers: bool = True,
    report: SourceReport | None = None,
    keep_going: bool = False,
    context: str = "",
    rejected: bool = False,
) -> Iterator[Example]:
    """The examples of a source, one after the other.

    source: what to read.
    data: its `directory` is the folder from which relative paths start.
    key: configuration key of the source, for messages, e.g. "data.prompts".
    with_answers: False reads no answers, and their field need not exist.
    report: is told what was read.
    keep_going: leave out rows that cannot be used, whatever the source says.
    context: the template of Example.context.
    rejected: read the rejected answer of preferences in place of the preferred one.
    Raises: DataError if the source is missing, empty, too small, or holds a row that cannot be
        used.
    """
    report = report or SourceReport()
    if isinstance(source, EmbeddedSource):
        yield from _read_embedded(source, with_answers, report, context)
        return
    tables = _open_tables(source, data, key)
    reader = _RowReader(
        source, tables, key, with_answers, report, context=context, rejected=rejected
    )
    asked = source.num_examples
    leave_out = source.leave_out_refused or keep_going
    for where, row in reader.named_rows():
        report.num_rows += 1
        if report.num_rows <= source.skip:
            continue
        try:
            example = reader.read(where, row)
        except DataError as error:
            if not leave_out:
                raise
            report.refuse(error)
            continue
        if example is None:
            report.num_empty += 1
            continue
        report.num_examples += 1
        yield example
        if report.num_examples == asked:
            break
    _check_count(report, source, key)


class _RowReader:
    """Reads the rows of one source's tables with one field map, found where none is given."""

    def __init__(
        self,
        source: RowSource,
        tables: Sequence[_Table],
        key: str,
        with_answers: bool,
        report: SourceReport,
        *,
        context: str = "",
        rejected: bool = False,
    ) -> None:
        self._source = source
        self._tables = tables
        self._key = f"{key}.fields"
        self._with_answers = with_answers
        self._context = context
        report.place = tables[0].name
        if len(tables) > 1:
            report.place = f"{len(tables)} files ({tables[0].name} to {tables[-1].name})"
        self._fields = source.fields or self._find_fields()
        if rejected:
            self._fields = _other_answer(self._fields, key)
        if self._fields is not None:
            report.layout = told_layout(self._fields)
            report.unread = self._unread()

    def named_rows(self) -> NamedRows:
        """All rows of all tables in order, with their places."""
        if self._fields is None:
            return
        needed = needed_fields(self._fields, self._with_answers)
        of_context = _context_fields(self._context)
        for table in self._tables:
            existing = table.columns()
            columns = None
            if existing is not None:
                check_fields(needed, existing, table.name, self._key)
                check_fields(of_context, existing, table.name, _CONTEXT)
                columns = needed_columns([*needed, *of_context], existing)
            yield from table.rows(columns)

    def read(self, where: str, row: Row | DataError) -> Example | None:
        """The example of a row; None if it is empty and such rows are left out.

        Raises: DataError if the row cannot be used.
        """
        if isinstance(row, DataError):
            raise row
        fields, with_answers = self._fields, self._with_answers
        assert fields is not None, "rows are read with the fields found in them"
        if self._source.leave_out_empty and lacks_text(row, fields, with_answers):
            return None
        check_fields(needed_fields(fields, with_answers), row.keys(), where, self._key)
        check_fields(_context_fields(self._context), row.keys(), where, _CONTEXT)
        whole = row
        row, fields = to_basic_row(row, fields, where)
        if self._source.leave_out_empty and lacks_text(row, fields, with_answers):
            return None  # the chat of another form
        example = read_example(row, fields, where=where, key=self._key, with_answers=with_answers)
        return example.with_context(self._context, whole) if self._context else example

    def _find_fields(self) -> FieldMap | None:
        """The field map that the first rows ask for; None if there is no row."""
        for table in self._tables:
            first = [row for _, row in islice(table.rows(), ROWS_LOOKED_AT)]
            rows = [row for row in first if not isinstance(row, DataError)]
            if rows:
                return find_layout(
                    rows, where=table.name, key=self._key, with_answers=self._with_answers
                ).fields
            if first:
                raise next(row for row in first if isinstance(row, DataError))
        return None

    def _unread(self) -> tuple[str, ...]:
        """Columns of the first rows that hold neither prompt nor answer."""
        assert self._fields is not None
        table = self._tables[0]
        existing = table.columns()
        if existing is None:
            first = (row for _, row in islice(table.rows(), ROWS_LOOKED_AT))
            rows = (row for row in first if not isinstance(row, DataError))
            existing = list(dict.fromkeys(name for row in rows for name in row))
        read = set(needed_columns(needed_fields(self._fields, True), existing))
        return tuple(name for name in existing if name not in read)


def _other_answer(fields: FieldMap | None, key: str) -> FieldMap | None:
    """Where the rejected answer of preferences stands."""
    if fields is None or isinstance(fields, PreferenceFields):
        return None if fields is None else fields.model_copy(update={"chosen": fields.rejected})
    raise DataError(
        f"{key}: expected rows with a preferred and a rejected answer, got {told_layout(fields)}. "
        f"Name their columns by {key}.fields={{format: preference, chosen: ..., rejected: ...}}"
    )


def _open_tables(source: RowSource, data: DataConfig, key: str) -> Sequence[_Table]:
    directory = Path(data.directory)
    if isinstance(source, DatasetsSource):
        return [load_dataset(source, directory, key)]
    if isinstance(source, FilesSource):
        if isinstance(source.path, str):
            folder = directory / source.path
            if is_saved(folder):
                return [load_saved(folder, source.split, key)]
        return find_files(source, data.directory, key)
    assert isinstance(source, JsonlSource | ParquetSource)
    _require_file(source.path, data.directory, key)
    same = FilesSource(type="files", path=source.path, format=source.type)
    return find_files(same, data.directory, key)


def _require_file(path: str, directory: str, key: str) -> None:
    tried = (Path(directory) / path).absolute()
    if tried.is_file():
        return
    actual = "there is no such file"
    if tried.is_dir():
        actual = f"it is a folder, which {key}.type=files reads"
    raise DataError(
        f"{key}.path={path!r}: expected a file at {tried}, {actual}; relative paths start from "
        f"data.directory={directory!r}"
    )


def _read_embedded(
    source: EmbeddedSource, with_answers: bool, report: SourceReport, context: str
) -> Iterator[Example]:
    report.place = f"embedded {source.split}"
    for i, task in enumerate(generate_tasks(source.split, source.num_examples, source.seed)):
        report.num_rows = report.num_examples = i + 1
        example = Example(
            row=f"embedded {source.split}[{i}]",
            prompt=task.prompt,
            references=task.references if with_answers else (),
            answer=task.answer if with_answers else None,
        )
        row = {"prompt": task.prompt, "response": task.answer}
        check_fields(_context_fields(context), row.keys(), example.row, _CONTEXT)
        yield example.with_context(context, row) if context else example


def _context_fields(context: str) -> NeededFields:
    return [("text", name) for name in template_fields(context)]


def _check_count(report: SourceReport, source: RowSource, key: str) -> None:
    if report.num_rows == 0:
        raise DataError(
            f"{key}: the data set is empty ({report.place}); give one with at least one row"
        )
    asked, num_examples = source.num_examples, report.num_examples
    if num_examples == 0 or (asked is not None and num_examples < asked):
        wanted = "at least one row" if asked is None else f"{asked} rows"
        kept = f", of which {num_examples} with text" if source.leave_out_empty else ""
        if report.num_refused:
            kept += f", and {report.num_refused} were refused, the first: {report.refused[0]}"
        raise DataError(
            f"{key}: expected {wanted} after skipping {source.skip}, the data set has "
            f"{report.num_rows}{kept}; lower {key}.num_examples or {key}.skip"
        )
