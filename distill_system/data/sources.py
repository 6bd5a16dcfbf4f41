"""Reads examples from JSONL, parquet, `datasets`, and the embedded tasks.

In: a configured source.  Out: its examples. A row that cannot be used is an error that names the
file and the row. JSONL and parquet are not read through `datasets`: it converts all rows to one
schema, in which a field that one row lacks is null, so that a missing field would go unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from distill_system.config.data import (
    DataConfig,
    DatasetsSource,
    EmbeddedSource,
    JsonlSource,
    ParquetSource,
    RowSource,
    Source,
)
from distill_system.data.embedded_tasks import generate_tasks
from distill_system.data.examples import Example, read_example
from distill_system.data.row_fields import (
    Row,
    check_fields,
    lacks_text,
    needed_columns,
    needed_fields,
)
from distill_system.errors import DataError

ROWS_PER_READ = 4096

NamedRows = Iterator[tuple[str, Row]]


def load_examples(
    source: Source, data: DataConfig, *, key: str = "source", with_answers: bool = True
) -> list[Example]:
    """All examples of a source.

    Args:
        source: what to read.
        data: its `directory` is the folder from which relative paths start.
        key: configuration key of the source, for messages, e.g. "data.prompts".
        with_answers: False reads no answers, and their field need not exist.

    Raises:
        DataError: the source is missing, empty, too small, or holds a row that cannot be used.
    """
    if isinstance(source, EmbeddedSource):
        return _load_embedded(source, with_answers)
    rows = _open_rows(source, data, key, with_answers)
    examples: list[Example] = []
    num_rows = 0
    for num_rows, (where, row) in enumerate(rows, 1):
        if num_rows <= source.skip:
            continue
        if source.leave_out_empty and lacks_text(row, source.fields, with_answers):
            continue
        examples.append(
            read_example(
                row, source.fields, where=where, key=f"{key}.fields", with_answers=with_answers
            )
        )
        if len(examples) == source.num_examples:
            break
    _check_count(len(examples), num_rows, source, key)
    return examples


def _open_rows(
    source: JsonlSource | ParquetSource | DatasetsSource,
    data: DataConfig,
    key: str,
    with_answers: bool,
) -> NamedRows:
    if isinstance(source, DatasetsSource):
        return _read_datasets(source, Path(data.directory), key, with_answers)
    path = _find_file(source.path, data.directory, key)
    if isinstance(source, JsonlSource):
        return _read_jsonl(path)
    return _read_parquet(path, source, key, with_answers)


def _load_embedded(source: EmbeddedSource, with_answers: bool) -> list[Example]:
    tasks = generate_tasks(source.split, source.num_examples, source.seed)
    return [
        Example(
            row=f"embedded {source.split}[{i}]",
            prompt=task.prompt,
            references=task.references if with_answers else (),
            answer=task.answer if with_answers else None,
        )
        for i, task in enumerate(tasks)
    ]


def _check_count(num_examples: int, num_rows: int, source: RowSource, key: str) -> None:
    if num_rows == 0:
        raise DataError(f"{key}: the data set is empty; give one with at least one row")
    asked = source.num_examples
    if num_examples == 0 or (asked is not None and num_examples < asked):
        wanted = "at least one row" if asked is None else f"{asked} rows"
        kept = f", of which {num_examples} with text" if source.leave_out_empty else ""
        raise DataError(
            f"{key}: expected {wanted} after skipping {source.skip}, the data set has {num_rows}"
            f"{kept}; lower {key}.num_examples or {key}.skip"
        )


def _find_file(path: str, directory: str, key: str) -> Path:
    tried = (Path(directory) / path).absolute()
    if tried.is_file():
        return tried
    actual = "it is a folder" if tried.is_dir() else "there is no such file"
    raise DataError(
        f"{key}.path={path!r}: expected a file at {tried}, {actual}; relative paths start from "
        f"data.directory={directory!r}"
    )


def _read_jsonl(path: Path) -> NamedRows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise DataError(f"{path}:{number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}:{number}: expected one JSON object a line, got {type(row).__name__}"
                )
            yield where, row


def _read_parquet(path: Path, source: ParquetSource, key: str, with_answers: bool) -> NamedRows:
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {error}") from error
    with table:
        needed = needed_fields(source.fields, with_answers)
        existing = table.schema_arrow.names
        check_fields(needed, existing, str(path), f"{key}.fields")
        number = 0
        for batch in table.iter_batches(ROWS_PER_READ, columns=needed_columns(needed, existing)):
            for row in batch.to_pylist():
                yield f"{path.name}[{number}]", row
                number += 1


def _read_datasets(
    source: DatasetsSource, directory: Path, key: str, with_answers: bool
) -> NamedRows:
    import datasets  # imported here: it takes a second, and other sources do not need it

    folder = directory / source.name
    name = str(folder) if folder.is_dir() else source.name
    try:
        table = datasets.load_dataset(
            name,
            source.subset,
            data_dir=source.folder,
            split=source.split,
            revision=source.revision,
        )
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{key}: `datasets` could not load name={name!r}, subset={source.subset!r}, "
            f"folder={source.folder!r}, revision={source.revision!r}, split={source.split!r}: "
            f"{error}"
        ) from error
    needed = needed_fields(source.fields, with_answers)
    check_fields(needed, table.column_names, f"{name} ({source.split})", f"{key}.fields")
    rows = table.select_columns(needed_columns(needed, table.column_names))
    for number, row in enumerate(rows):
        yield f"{source.name} {source.split}[{number}]", row
