"""Files of rows: finds them, and reads JSON, JSONL, CSV, TSV, parquet and Arrow one row at a time.

In: paths, folders and patterns.  Out: files, each of which yields its rows with their places. They
are not read through `datasets`: it converts all rows to one schema, in which a field that one row
lacks is null, so that a missing field would go unnoticed.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from distill_system.config.data import FileFormat, FilesSource
from distill_system.data.row_values import Row, without_padding
from distill_system.errors import DataError

NamedRows = Iterator[tuple[str, Row | DataError]]
"""Each row with its place; in the place of one that cannot be read, the reason."""

ROWS_PER_READ = 4096
LONGEST_CELL = 1 << 30
"""Characters of a CSV cell; Python's own limit of 131,072 is too short for documents."""

ENDINGS: dict[str, FileFormat] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
# Written beside the data by `datasets` and by the hub.
_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_GZIP = b"\x1f\x8b"
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFile:
    """One file of rows.

    name: how messages call it, without its folder.  split: the one to read of a JSON file of
    several; None where it holds one.
    """

    path: Path
    name: str
    format: FileFormat
    split: str | None = None

    def columns(self) -> list[str] | None:
        """The columns of a table; None for a format whose rows have fields of their own.

        Raises: DataError if the file cannot be read.
        """
        if self.format not in _TABLES:
            return None
        with _naming(self.path, "its header"):
            return _TABLES[self.format].columns(self.path)

    def rows(self, columns: Sequence[str] | None = None) -> NamedRows:
        """All rows in order.

        columns: of a table, only these; None reads all.
        Raises: DataError if the file cannot be read, or not to its end; it names the place.
        """
        if self.format not in _TABLES:
            yield from _TEXTS[self.format](self)
            return
        number = 0
        batches = iter(_TABLES[self.format].batches(self.path, columns))
        while True:
            with _naming(self.path, f"rows from {number} on"):
                batch = next(batches, None)
                if batch is None:
                    return
                rows = batch.to_pylist()
            for row in rows:
                yield f"{self.name}[{number}]", without_padding(row)
                number += 1


# ---- finding files -------------------------------------------------------------------------------


def find_files(source: FilesSource, directory: str, key: str) -> list[RowFile]:
    """The files of a source, in the order of its paths; those of a folder or pattern by name.

    Raises: DataError if there are none, they are of several formats or splits, or a format is not
        known; the message names the key.
    """
    paths = (source.path,) if isinstance(source.path, str) else source.path
    found: list[RowFile] = []
    for path in paths:
        found += _files_of(path, source, directory, key)
    if not found:
        raise DataError(f"{key}.path: expected at least one path, got an empty list")
    _require_one_format(found, key)
    return found


def _files_of(path: str, source: FilesSource, directory: str, key: str) -> list[RowFile]:
    tried = (Path(directory) / path).absolute()
    if tried.is_file():
        file = _row_file(tried, tried.name, source, key)
        if source.split is not None and file.format != "json":
            _of_split([file], source.split, key)
        return [file]
    if tried.is_dir():
        base, matches = tried, sorted(tried.rglob("*"))
    else:
        base, pattern = _split_pattern(tried)
        matches = sorted(base.glob(pattern)) if pattern else []
    files = [each for each in matches if each.is_file() and _is_data(each.relative_to(base))]
    if source.format is None:
        files = [each for each in files if _format_of(each) is not None]
    if files:
        named = [_row_file(each, str(each.relative_to(base)), source, key) for each in files]
        return _of_split(named, source.split, key)
    endings = ", ".join(ENDINGS)
    actual = f"a folder without files that end in {endings}" if tried.is_dir() else "there is none"
    raise DataError(
        f"{key}.path={path!r}: expected a file, a folder of files or a pattern at {tried}, "
        f"{actual}; relative paths start from data.directory={directory!r}"
    )


def _split_pattern(path: Path) -> tuple[Path, str]:
    """The folder before the first part with a wildcard, and the rest; "" if there is none."""
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    return Path(*parts[:first]), str(Path(*parts[first:])) if first < len(parts) else ""


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return not hidden and path.name not in _NO_DATA


def _format_of(path: Path) -> FileFormat | None:
    endings = [ending.lower() for ending in path.suffixes]
    if endings[-1:] == [".gz"]:
        endings.pop()
    return ENDINGS.get(endings[-1]) if endings else None


def _row_file(path: Path, name: str, source: FilesSource, key: str) -> RowFile:
    form = source.format or _format_of(path)
    if form is None:
        raise DataError(
            f"{path}: its ending says none of the formats {', '.join(ENDINGS)} (also with .gz); "
            f"give {key}.format"
        )
    return RowFile(path=path, name=name, format=form, split=source.split)


def _require_one_format(files: Sequence[RowFile], key: str) -> None:
    counts = Counter(file.format for file in files)
    if len(counts) > 1:
        first = {form: next(f.name for f in files if f.format == form) for form in counts}
        listed = ", ".join(f"{counts[form]} {form} ({first[form]})" for form in counts)
        raise DataError(
            f"{key}.path: the files are of {len(counts)} formats: {listed}. Name those of one by a "
            f"pattern, such as {key}.path='*.{next(iter(counts))}'"
        )


def _of_split(files: list[RowFile], split: str | None, key: str) -> list[RowFile]:
    """The files of one split; the whole set where their names say no more than one."""
    named = {file.path: _split_in(file.name) for file in files}
    splits = sorted({name for name in named.values() if name})
    shown = ", ".join(file.name for file in files[:6])
    if split is None:
        if len(splits) > 1:
            raise DataError(
                f"{key}.path: the {len(files)} files are of several splits ({shown}): give "
                f"{key}.split, one of {splits}, or name the files by a pattern"
            )
        return files
    if not splits and all(file.format == "json" for file in files):
        return files  # each holds a mapping of splits
    wanted = _SPLIT_WORDS.get(split.lower(), split)
    kept = [file for file in files if named[file.path] == wanted]
    if not kept:
        raise DataError(
            f"{key}.split={split!r}: the names of the files ({shown}) say "
            f"{f'the splits {splits}' if splits else 'no split'}; remove the key or name the files"
        )
    # What the name says is said: the file itself need not hold a mapping of splits.
    return [replace(file, split=None) for file in kept]


def _split_in(name: str) -> str | None:
    """The split that a file's name or folder says: train-00000.jsonl, test/part.parquet."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


# ---- texts ---------------------------------------------------------------------------------------


def _open(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where it is gzipped, whatever its ending."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _naming(path, "the beginning"):
        file = _open(path)
    with file:
        while True:
            with _naming(path, f"the lines after {number}"):
                line = file.readline()
            if not line:
                return
            number += 1
            yield number, line


def _read_jsonl(file: RowFile) -> NamedRows:
    for number, line in _lines(file.path):
        if line.strip():
            yield f"{file.name}:{number}", _read_line(line, f"{file.path}:{number}", number)


def _read_line(line: bytes, where: str, number: int) -> Row | DataError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or too deep
        return DataError(f"{where}: not valid JSON: {error}{_hint(line, number)}")
    if not isinstance(row, dict):
        hint = "; a file of one JSON list is read by type: files" if number == 1 else ""
        return DataError(
            f"{where}: expected one JSON object a line, got {type(row).__name__}{hint}"
        )
    return row


def _hint(line: bytes, number: int) -> str:
    if number == 1 and line.startswith(_POINTER):
        return "; the file is a Git LFS pointer: fetch the data itself (git lfs pull)"
    if number == 1 and line.strip() in (b"[", b"{"):
        return "; a file of one JSON list or mapping is read by type: files, format: json"
    return ""


def _read_json(file: RowFile) -> NamedRows:
    """A list of objects, {"data": [...]}, a mapping of splits, or lines of objects after all."""
    with _naming(file.path, "it"), _open(file.path) as opened:
        text = opened.read()
    if not text.strip():
        return
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):  # several objects: JSONL under another ending
            yield from _read_jsonl(file)
            return
        raise DataError(f"{file.path}: not valid JSON: {error}{_hint(text, 1)}") from error
    rows, place = _list_of_rows(tree, file)
    for number, row in enumerate(rows):
        where = f"{file.name}{place}[{number}]"
        if isinstance(row, dict):
            yield where, row
        else:
            yield (
                where,
                DataError(
                    f"{file.path}{place}[{number}]: expected an object, got {type(row).__name__}"
                ),
            )


def _list_of_rows(tree: object, file: RowFile) -> tuple[Iterable[object], str]:
    """The rows of a JSON file, and the key under which they stand, as ".train" or ""."""
    if isinstance(tree, list):
        return tree, ""
    if isinstance(tree, dict):
        lists = {
            name: rows
            for name, rows in tree.items()
            if isinstance(rows, list) and rows and isinstance(rows[0], dict)
        }
        if file.split is not None and file.split in lists:
            return lists[file.split], f".{file.split}"
        if len(lists) == 1 and file.split is None:
            (name,) = lists
            return lists[name], f".{name}"
        if not lists:
            return [tree], ""  # one row
        raise DataError(
            f"{file.path}: holds rows under {sorted(lists)}, and split={file.split!r}: give one of "
            "them as the source's split"
        )
    raise DataError(
        f"{file.path}: expected a JSON list of objects, or a mapping of splits to such lists, got "
        f"{type(tree).__name__}"
    )


def _read_separated(file: RowFile) -> NamedRows:
    """CSV and TSV with a header; every value is a text."""
    csv.field_size_limit(LONGEST_CELL)
    lines = (_decode(line, f"{file.path}:{number}") for number, line in _lines(file.path))
    reader = csv.reader(lines, delimiter="\t" if file.format == "tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{file.path}:{first}: not valid {file.format}: {error}") from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(cells, file)
            continue
        where = f"{file.name}:{first}"
        if len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        else:
            yield (
                where,
                DataError(
                    f"{file.path}:{first}: expected {len(header)} cells as in the header, got "
                    f"{len(cells)}; put texts that hold the separator in quotes"
                ),
            )


def _header(cells: list[str], file: RowFile) -> list[str]:
    names = [name.strip() for name in cells]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice or not all(names):
        raise DataError(
            f"{file.path}:1: the first line must name every column, each once; got {names}"
        )
    return names


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig" if line.startswith(b"\xef\xbb\xbf") else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected UTF-8 text, got other bytes: {error}") from error


_TEXTS: dict[FileFormat, Callable[[RowFile], NamedRows]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_separated,
    "tsv": _read_separated,
}


# ---- tables --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _TableFormat:
    columns: Callable[[Path], list[str]]
    batches: Callable[[Path, Sequence[str] | None], Iterable[pyarrow.RecordBatch]]


def _parquet_columns(path: Path) -> list[str]:
    with pyarrow.parquet.ParquetFile(path) as table:
        return list(table.schema_arrow.names)


def _parquet_batches(path: Path, columns: Sequence[str] | None) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.parquet.ParquetFile(path) as table:
        yield from table.iter_batches(ROWS_PER_READ, columns=columns)


@contextmanager
def _open_arrow(path: Path) -> Iterator[Any]:
    """A reader of either form: that of a file (feather), or that of a stream (`datasets`)."""
    with pyarrow.memory_map(str(path)) as mapped:
        try:
            reader = pyarrow.ipc.open_file(mapped)
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            reader = pyarrow.ipc.open_stream(mapped)
        yield reader


def _arrow_columns(path: Path) -> list[str]:
    with _open_arrow(path) as reader:
        return list(reader.schema.names)


def _arrow_batches(path: Path, columns: Sequence[str] | None) -> Iterator[pyarrow.RecordBatch]:
    with _open_arrow(path) as reader:
        whole = (
            iter(reader)
            if isinstance(reader, pyarrow.ipc.RecordBatchStreamReader)
            else map(reader.get_batch, range(reader.num_record_batches))
        )
        for batch in whole:
            chosen = batch if columns is None else batch.select(list(columns))
            for start in range(0, chosen.num_rows, ROWS_PER_READ):
                yield chosen.slice(start, ROWS_PER_READ)


_TABLES: dict[FileFormat, _TableFormat] = {
    "parquet": _TableFormat(_parquet_columns, _parquet_batches),
    "arrow": _TableFormat(_arrow_columns, _arrow_batches),
}


@contextmanager
def _naming(path: Path, what: str) -> Iterator[None]:
    """Turn what a library raises into one message that names the file.

    what: the part that was being read.
    """
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: {what} cannot be read, the gzip file is damaged: {error}. Fetch it anew"
        ) from error
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = {
            ".parquet": "not a parquet file, or damaged",
            ".arrow": "not an Arrow file, or damaged",
        }
        said = kind.get(path.suffix, "cannot be read")
        raise DataError(f"{path}: {said}: {what}: {error}") from error
