"""The teacher's targets of stored samples, so that the teacher reads each sample only once.

In: TeacherTargets by the key of their sample.  Out: a folder of parts, one row a sample, and the
targets of the samples asked for. A row holds T x (H + E) numbers: megabytes for a large teacher.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from distill_system.config.objective import TeacherNeeds
from distill_system.data.parquet_parts import find_parts, open_part, remove_abandoned, write_part
from distill_system.errors import DataError
from distill_system.records import TeacherTargets

WIDE = ("features", "expected_embedding")
FLOAT16_BYTES, FLOAT32_BYTES = 2, 4
ROW_GROUP_ROWS = 16
"""Samples that are read from the disk together; few, because each holds a matrix."""
_FIXED = {
    "key": pyarrow.string(),
    "reading": pyarrow.string(),
    "num_tokens": pyarrow.int32(),
    "logprobs": pyarrow.list_(pyarrow.float32()),
    "top_k_ids": pyarrow.list_(pyarrow.int32()),
    "top_k_logprobs": pyarrow.list_(pyarrow.float32()),
}


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
    number = _number_type(targets)
    schema = pyarrow.schema([*_FIXED.items(), *((name, pyarrow.list_(number)) for name in WIDE)])
    columns: dict[str, Any] = {name: _flat(targets, name) for name in schema.names[3:]}
    fixed = {
        "key": list(keys),
        "reading": [reading] * len(keys),
        "num_tokens": [each.num_tokens for each in targets],
    }
    return pyarrow.table(fixed | columns, schema=schema)


def predict_bytes(
    num_tokens: int, needs: TeacherNeeds, *, hidden: int, actions: int, half: bool
) -> int:
    """Bytes of the targets of num_tokens response tokens, before compression.

    hidden, actions: H and E, columns of the features and of the expected embeddings.
    half: whether the scorer sends those as float16.
    """
    columns = hidden * needs.features + actions * needs.expected_embedding
    narrow = FLOAT32_BYTES * (needs.logprobs + 2 * needs.top_k)
    return num_tokens * (columns * (FLOAT16_BYTES if half else FLOAT32_BYTES) + narrow)


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


def _number_type(targets: Iterable[TeacherTargets]) -> pyarrow.DataType:
    """float16 where the scorer sent that; float32 where one of them needs it, which holds both."""
    arrays = [getattr(each, name) for each in targets for name in WIDE]
    is_half = all(array.dtype == np.float16 for array in arrays if array is not None)
    return pyarrow.float16() if is_half else pyarrow.float32()


def _flat(targets: Sequence[TeacherTargets], name: str) -> list[Any]:
    arrays = [getattr(each, name) for each in targets]
    return [None if array is None else array.reshape(-1) for array in arrays]


def _read_targets(row: dict[str, Any], trajectory_id: str) -> TeacherTargets:
    num_tokens = row["num_tokens"].as_py()
    flat = {
        name: row[name].values.to_numpy()
        for name in ("logprobs", "top_k_ids", "top_k_logprobs", *WIDE)
        if row[name].is_valid
    }
    fields = {
        name: array if name == "logprobs" else array.reshape(num_tokens, -1)
        for name, array in flat.items()
    }
    return TeacherTargets(trajectory_id=trajectory_id, num_tokens=num_tokens, **fields)
