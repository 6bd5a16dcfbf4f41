"""Sizes and checksums of a checkpoint's files: what was written, and whether it still stands."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

READ_BYTES = 1 << 20


class FileRecord(NamedTuple):
    """A file as it was written: its length in bytes and its CRC-32, in [0, 2**32)."""

    num_bytes: int
    crc32: int


def describe_file(path: Path) -> FileRecord:
    """Read a file through once.

    Raises: OSError if it cannot be read.
    """
    num_bytes = crc32 = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            num_bytes += len(part)
            crc32 = zlib.crc32(part, crc32)
    return FileRecord(num_bytes, crc32)


def find_misfits(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """Files that are missing or of another length, each with what is wrong; reads none of them."""
    found: list[str] = []
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (now := path.stat().st_size) != written.num_bytes:
            found.append(f"{name} has {now} bytes, was written with {written.num_bytes}")
    return found


def find_alterations(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """As find_misfits, and files whose bytes are no longer those that were written."""
    found = find_misfits(folder, files)
    if not found:
        found = [
            f"{name} was altered: its CRC-32 is {now.crc32:08x}, was written as {written.crc32:08x}"
            for name, written in files.items()
            if (now := describe_file(folder / name)) != written
        ]
    return found
