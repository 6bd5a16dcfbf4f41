"""The teacher's targets of stored samples, so that the teacher reads each sample only once.

In: TeacherTargets by the key of their sample.  Out: a folder of parts, one row a sample, and the
targets of the samples asked for. A row holds T x (F + E) numbers: megabytes for a large teacher.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from distill_system.config.objective.needs import SIGNALS, Signal
from distill_system.data.parquet_parts import find_parts, open_part, remove_abandoned, write_part
from distill_system.errors import DataError
from distill_system.records import TeacherTargets

ROW_GROUP_ROWS = 16
"""Samples that are read from the disk together; few, because each holds a matrix."""
_IDENTITY = {
    "key": pyarrow.string(),
    "reading": pyarrow.string(),
    "num_tokens": pyarrow.int32(),
}
"""Columns beside those of the signals."""


class _Place(NamedTuple):
    part: Path
    row_group: int
    row: int


class TargetStore:
    """The targets of one store's samples by one reading.

    reading: identifies the teacher, its precision and which targets were computed (see
    run.sample_origin.describe_reading); rows of other readings are ignored.
    """

    def __init__(self, store: Path, reading: str) -> None:
        self.folder = target_folder(store)
        self.reading = reading
        remove_abandoned(self.folder)
        self._places: dict[str, _Place] = {}
        for part in find_parts(self.folder):
            self._add(part)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def append(self, rows: pyarrow.Table) -> int:
        """Write the rows of make_target_rows whose keys are new, as one part; returns their number.

        Raises: DataError if they cannot be written.
        """
        new = [key not in self._places for key in rows["key"].to_pylist()]
        kept = rows.filter(pyarrow.array(new, pyarrow.bool_()))
        if kept.num_rows:
            self._add(write_part(self.folder, kept, row_group_rows=ROW_GROUP_ROWS))
        return int(kept.num_rows)

    def read(self, keys: Sequence[str], trajectory_ids: Sequence[str]) -> list[TeacherTargets]:
        """The targets of these samples, each with the id of its trajectory in this run.

        Raises: KeyError for a sample without targets.
        """
        wanted: dict[tuple[Path, int], list[int]] = defaultdict(list)
        for at, key in enumerate(keys):
            place = self._places[key]
            wanted[place.part, place.row_group].append(at)
        found: dict[int, TeacherTargets] = {}
        for (part, row_group), positions in wanted.items():
            with open_part(part) as opened:
                table = opened.read_row_group(row_group)
            for at in positions:
                row = {name: table[name][self._places[keys[at]].row] for name in table.column_names}
                found[at] = _read_targets(row, trajectory_ids[at])
        return [found[at] for at in range(len(keys))]

    def _add(self, part: Path) -> None:
        with open_part(part) as opened:
            for group in range(opened.num_row_groups):
                table = opened.read_row_group(group, columns=["key", "reading"]).to_pydict()
                for row, (key, reading) in enumerate(zip(*table.values(), strict=True)):
                    if reading == self.reading:
                        self._places.setdefault(key, _Place(part, group, row))


def target_folder(store: Path) -> Path:
    """The folder of the parts of targets."""
    return store / "targets"


def make_target_rows(
    keys: Sequence[str], targets: Sequence[TeacherTargets], reading: str
) -> pyarrow.Table:
    """Targets as a table; matrices are flattened row by row, num_tokens gives their shapes back."""
    types = {signal.name: pyarrow.list_(_number_type(signal, targets)) for signal in SIGNALS}
    identity: dict[str, Any] = {
        "key": list(keys),
        "reading": [reading] * len(keys),
        "num_tokens": [each.num_tokens for each in targets],
    }
    columns = {name: _flat(targets, name) for name in types}
    return pyarrow.table(identity | columns, schema=pyarrow.schema(_IDENTITY | types))


def require_room(folder: Path, num_bytes: float) -> None:
    """Check that the disk of a folder has room for num_bytes.  Raises: DataError if not."""
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise DataError(
            f"{folder.absolute()}: the teacher's targets take up to {num_bytes / 2**30:.2f} GiB, "
            f"its disk has {free / 2**30:.2f} GiB free. Make room, give another folder (--out), "
            "or leave out --cache-targets: the teacher then reads the samples as the run goes on"
        )


def _number_type(signal: Signal, targets: Iterable[TeacherTargets]) -> pyarrow.DataType:
    """The smallest of the signal's dtypes that holds all of these: float32 holds float16 too."""
    arrays = (getattr(each, signal.name) for each in targets)
    found = {array.dtype.name for array in arrays if array is not None}
    needed = [dtype for dtype in signal.dtypes if dtype in found]
    return pyarrow.from_numpy_dtype(np.dtype((needed or signal.dtypes)[-1]))


def _flat(targets: Sequence[TeacherTargets], name: str) -> list[Any]:
    arrays = [getattr(each, name) for each in targets]
    return [None if array is None else array.reshape(-1) for array in arrays]


def _read_targets(row: dict[str, Any], trajectory_id: str) -> TeacherTargets:
    num_tokens = row["num_tokens"].as_py()
    flat = {
        signal: row[signal.name].values.to_numpy()
        for signal in SIGNALS
        if row[signal.name].is_valid
    }
    arrays = {
        signal.name: array.reshape(num_tokens, -1) if signal.axis else array
        for signal, array in flat.items()
    }
    return TeacherTargets(trajectory_id=trajectory_id, num_tokens=num_tokens, **arrays)
