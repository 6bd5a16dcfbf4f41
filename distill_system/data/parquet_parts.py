"""A folder of parquet parts: appended to by many, whole at every moment, readable by anyone.

A part is written beside and renamed, and never touched again. Its name is new, so that writers on
any number of machines need not know of one another.
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
"""Begins the name of a part that is being written; readers of parquet folders skip such names."""
ABANDONED_SECONDS = 3600.0
"""What nobody has written to for so long, its writer has left behind."""


def write_part(folder: Path, table: pyarrow.Table, *, row_group_rows: int | None = None) -> Path:
    """Append one part; a crash at any moment leaves the parts that were there.

    row_group_rows: rows that are read together; None leaves it to pyarrow.
    Raises: DataError if the disk is full or the folder not writable; nothing is left behind.
    """
    name = f"part-{uuid.uuid4().hex}.parquet"
    beside = folder / f"{PREFIX}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            table, beside, compression="zstd", row_group_size=row_group_rows
        )
        _flush(beside)
        beside.rename(folder / name)
        _flush(folder)  # the rename itself is on the disk only when its folder is
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DataError(
            f"{folder}: a part of {table.num_rows} rows cannot be written: {error}. Make room or "
            "give another folder, and start again: what stands there is whole"
        ) from error
    return folder / name


def find_parts(folder: Path) -> list[Path]:
    """The parts that are whole, by name; none where there is no folder."""
    return sorted(folder.glob("part-*.parquet"))


def remove_abandoned(folder: Path) -> int:
    """Remove what writers that were killed had half written, and say how many that was.

    Only what has not changed for an hour: another writer may be at work now.
    """
    oldest = time.time() - ABANDONED_SECONDS
    abandoned = [p for p in folder.glob(f"{PREFIX}*") if p.stat().st_mtime < oldest]
    for path in abandoned:
        path.unlink(missing_ok=True)
    return len(abandoned)


def open_part(path: Path) -> pyarrow.parquet.ParquetFile:
    """A part to read.  Raises: DataError if it is not whole."""
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path}: expected a whole part of a trajectory store: {error}. Every part was whole "
            "when it was written: copy it again, or remove it and generate its samples anew"
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
