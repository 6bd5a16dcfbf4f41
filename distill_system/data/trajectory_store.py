"""The trajectory store: samples written once, kept in parquet, learned from by any number of runs.

In: trajectories with their origin.  Out: a folder of parts that pandas, `datasets` and pyarrow read
as they are, one row a sample; and the samples that a run may learn from, in an order of their own.

    STORE/trajectories/part-*.parquet    one row per sample, see stored_rows
    STORE/targets/part-*.parquet         what the teacher said of them, see target_store
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from distill_system.data.parquet_parts import find_parts, open_part, remove_abandoned, write_part
from distill_system.data.stored_rows import ROW_SCHEMA, SampleOrigin, make_rows
from distill_system.errors import DataError
from distill_system.records import Trajectory

TOKENIZER_KEY = b"distill_system.tokenizer_fingerprint"
"""Metadata of each part: whose token ids it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendCount:
    """Rows that an append wrote, and rows that it left out because they stood there already."""

    num_written: int
    num_already_there: int


class TrajectoryStore:
    """One folder of samples, to append to.

    Several may write to one folder at a time, from any machine that shares it.

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
        self.refresh()

    @property
    def num_rows(self) -> int:
        """Rows known of; `refresh` learns of others' since."""
        return sum(len(keys) for keys in self._keys)

    def refresh(self) -> None:
        """Take in parts that have come since, of whoever wrote them."""
        parts = [p for p in find_parts(trajectory_folder(self.folder)) if p not in self._seen]
        for part in parts:
            require_tokenizer(part, self.tokenizer_fingerprint)
            with open_part(part) as opened:
                self._add_keys(part, opened.read(columns=["key"])["key"])

    def has(self, keys: Sequence[str] | pyarrow.Array) -> npt.NDArray[np.bool_]:
        """Whether each key stands in the store, bool [keys]."""
        known = pyarrow.chunked_array(self._keys, type=pyarrow.string())
        asked = pyarrow.array(keys, type=pyarrow.string())
        return np.asarray(pyarrow.compute.is_in(asked, value_set=known))

    def append(
        self,
        trajectories: Sequence[Trajectory],
        origin: SampleOrigin,
        *,
        label: str,
        prompt_texts: Sequence[str] | None = None,
        response_texts: Sequence[str] | None = None,
    ) -> AppendCount:
        """Write the samples that are not there yet, as one part.

        Raises: DataError if it cannot be written, or has the token ids of another tokenizer.
        """
        texts = {"prompt_texts": prompt_texts, "response_texts": response_texts}
        return self.append_rows(make_rows(trajectories, origin, label=label, **texts))

    def append_rows(self, rows: pyarrow.Table) -> AppendCount:
        """As append, of a table of ROW_SCHEMA whose rows may have several origins."""
        self.refresh()
        self._require_own(rows)
        new = ~self.has(rows["key"].combine_chunks()) & _is_first(rows["key"])
        kept = rows.filter(pyarrow.array(new))
        if kept.num_rows:
            metadata = {TOKENIZER_KEY: self.tokenizer_fingerprint.encode()}
            table = kept.cast(ROW_SCHEMA).replace_schema_metadata(metadata)
            part = write_part(trajectory_folder(self.folder), table)
            self._add_keys(part, kept["key"])
        return AppendCount(
            num_written=kept.num_rows, num_already_there=rows.num_rows - kept.num_rows
        )

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
    """Where the parts of trajectories lie; what other programs are pointed at."""
    return store / "trajectories"


def require_tokenizer(part: Path, expected: str) -> None:
    """Refuse token ids that mean other texts.

    Raises: DataError, which says what to do.
    """
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
