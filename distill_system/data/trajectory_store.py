"""The trajectory store: samples generated once, kept in parquet, used by any number of runs.

    STORE/trajectories/part-*.parquet    one row per sample, see stored_rows
    STORE/targets/part-*.parquet         the teacher's targets of samples, see target_store

pandas, `datasets` and pyarrow read both folders as they are. This module appends;
stored_trajectories reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from distill_system.data.parquet_parts import find_parts, open_part, remove_abandoned, write_part
from distill_system.data.stored_rows import ROW_SCHEMA
from distill_system.errors import DataError

TOKENIZER_KEY = b"distill_system.tokenizer_fingerprint"
"""Metadata of each part: the fingerprint of the tokenizer that its token ids belong to."""


class TrajectoryStore:
    """One folder of samples, to append to; several processes may append to it at a time.

    Raises: DataError if the folder holds token ids of another tokenizer, or is a file.
    """

    def __init__(self, folder: Path, tokenizer_fingerprint: str) -> None:
        if folder.is_file():
            raise DataError(f"{folder}: a trajectory store is a folder, got a file")
        self.folder = folder
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self._seen: set[Path] = set()
        self._keys: list[pyarrow.Array] = []
        remove_abandoned(trajectory_folder(folder))
        self._refresh()

    def _refresh(self) -> None:
        """Read the keys of parts that any process has added since the last time."""
        parts = [p for p in find_parts(trajectory_folder(self.folder)) if p not in self._seen]
        for part in parts:
            require_tokenizer(part, self.tokenizer_fingerprint)
            with open_part(part) as opened:
                self._add_keys(part, opened.read(columns=["key"])["key"])

    def has(self, keys: Sequence[str] | pyarrow.Array) -> npt.NDArray[np.bool_]:
        """Whether the store holds each of these keys, bool [keys]."""
        known = pyarrow.chunked_array(self._keys, type=pyarrow.string())
        asked = pyarrow.array(keys, type=pyarrow.string())
        return np.asarray(pyarrow.compute.is_in(asked, value_set=known))

    def append(self, rows: pyarrow.Table) -> int:
        """Write those rows of a table of ROW_SCHEMA whose keys are new; returns their number.

        They become one part. The rows may have several origins.
        Raises: DataError if they cannot be written, or have token ids of another tokenizer.
        """
        self._refresh()
        self._require_own(rows)
        new = ~self.has(rows["key"].combine_chunks()) & _is_first(rows["key"])
        kept = rows.filter(pyarrow.array(new))
        if kept.num_rows:
            metadata = {TOKENIZER_KEY: self.tokenizer_fingerprint.encode()}
            table = kept.cast(ROW_SCHEMA).replace_schema_metadata(metadata)
            part = write_part(trajectory_folder(self.folder), table)
            self._add_keys(part, kept["key"])
        return int(kept.num_rows)

    def _add_keys(self, part: Path, keys: pyarrow.ChunkedArray) -> None:
        self._keys += keys.chunks
        self._seen.add(part)

    def _require_own(self, rows: pyarrow.Table) -> None:
        actual = set(rows["tokenizer_fingerprint"].unique().to_pylist())
        if actual - {self.tokenizer_fingerprint}:
            raise DataError(
                f"{self.folder}: expected samples of the tokenizer {self.tokenizer_fingerprint}, "
                f"got samples of {sorted(actual)}. Give them a store of their own"
            )


def trajectory_folder(store: Path) -> Path:
    """The folder of the parts of trajectories; give other programs this one."""
    return store / "trajectories"


def require_tokenizer(part: Path, expected: str) -> None:
    """Check that a part's token ids belong to this tokenizer.  Raises: DataError if not."""
    with open_part(part) as opened:
        actual = (opened.schema_arrow.metadata or {}).get(TOKENIZER_KEY, b"none").decode()
    if actual != expected:
        raise DataError(
            f"{part}: its token ids are of the tokenizer {actual}, the run's tokenizer is "
            f"{expected}, in which they mean other texts. Give the run the tokenizer that the "
            "store was made with (tokenizer.path), or another store (data.trajectory_store, or "
            "--out of `distill-system generate`)"
        )


def _is_first(keys: pyarrow.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Which rows are the first of their key."""
    _, first = np.unique(keys.to_numpy(), return_index=True)
    mask = np.zeros(len(keys), dtype=np.bool_)
    mask[first] = True
    return mask
