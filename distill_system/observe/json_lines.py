"""Files of one JSON object a line, to which a run appends while others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from distill_system.errors import RunStateError

Row = TypeVar("Row")


def read_rows(path: Path, kind: type[Row], *, expected: str) -> list[Row]:
    """Each line as a `kind`, in the order written; none if there is no such file yet.

    A last line without its end, as a run that is still writing has, is left out.

    Args:
        expected: the fields of a line, for the message.

    Raises:
        RunStateError: another line is not a row; the message says which.
    """
    if not path.exists():
        return []
    *lines, _half = path.read_text(encoding="utf-8").split("\n")
    return [_to_row(path, kind, n, line, expected) for n, line in enumerate(lines, start=1)]


def _to_row(path: Path, kind: type[Row], number: int, line: str, expected: str) -> Row:
    try:
        return kind(**json.loads(line))
    except (json.JSONDecodeError, TypeError) as error:
        raise RunStateError(
            f"{path}, line {number}: expected an object with {expected}, got {line[:80]!r}; delete "
            "that line"
        ) from error
