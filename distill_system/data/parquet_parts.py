"""A folder of parquet parts, to which several processes may append at the same time.

Each append writes one new part under a temporary name, then renames it; a part is never changed
afterwards. Readers therefore never see half a part. The names are random, so that writers on any
number of machines need no coordination.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pyarrow
import pyarrow.parquet

from distill_system.errors import DataError

PREFIX = ".writing-"
"""Prefix of a part that is being written; readers skip names that start with a dot."""
ABANDONED_SECONDS = 3600.0
"""A temporary file that has not changed for this long belongs to a process that was killed."""


def write_part(folder: Path, table: pyarrow.Table, *, row_group_rows: int | None = None) -> Path:
    """Append one part; a crash at any moment leaves the earlier parts as they were.

    row_group_rows: rows of a parquet row group, which are read together; None: pyarrow's default.
    Raises: DataError if the disk is full or the folder not writable; no file is left behind.
    """
    name = f"part-{uuid.uuid4().hex}.parquet"
    temporary = folder / f"{PREFIX}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            table, temporary, compression="zstd", row_group_size=row_group_rows
        )
        _flush(temporary)
        temporary.rename(folder / name)
        _flush(folder)  # without it a power cut can undo the rename
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"{folder}: a part of {table.num_rows} rows cannot be written: {error}. Make room or "
            "give another folder, and start again: all parts written before are complete"
        ) from error
    return folder / name


def find_parts(folder: Path) -> list[Path]:
    """The complete parts, sorted by name; none if there is no folder."""
    return sorted(folder.glob("part-*.parquet"))


def remove_abandoned(folder: Path) -> None:
    """Remove temporary files of killed writers; not younger ones, whose writer may be alive."""
    oldest = time.time() - ABANDONED_SECONDS
    for path in [p for p in folder.glob(f"{PREFIX}*") if p.stat().st_mtime < oldest]:
        path.unlink(missing_ok=True)


def open_part(path: Path) -> pyarrow.parquet.ParquetFile:
    """Open a part for reading.  Raises: DataError if it is not a complete parquet file."""
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path}: expected a complete part of a trajectory store: {error}. It was complete "
            "when it was written: copy it again, or remove it and generate its samples anew"
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
