"""Reads a trajectory store: the samples that a run may learn from, as a sequence.

In: a folder and a selection.  Out: trajectories, made one at a time from Arrow columns, sorted by
key, so that the order does not depend on when and by which process a sample was written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute as pc

from distill_system.data.parquet_parts import find_parts, open_part
from distill_system.data.stored_rows import TRAJECTORY_SCHEMA, SampleOrigin, read_trajectory
from distill_system.data.trajectory_store import require_tokenizer, trajectory_folder
from distill_system.errors import DataError
from distill_system.records import Trajectory

_NEEDED = ("key", "prompt_key", "policy_key", *TRAJECTORY_SCHEMA.names)
_SHOWN = ("author", "model", "model_fingerprint", "temperature", "top_p")
MOST_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which samples of a store to read; None and () select all.

    origin: only samples with its policy_key: its seed and maximum length do not count.
    keys: only these samples.
    blocked: no samples of these prompts, which are given by fingerprint_prompt.
    max_prompt_tokens, max_response_tokens: no longer samples.
    """

    origin: SampleOrigin | None = None
    keys: Collection[str] | None = None
    blocked: Collection[str] = ()
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None


class StoredTrajectories(Sequence[Trajectory]):
    """Samples of a store, sorted by key; each Trajectory is made when it is asked for.

    Memory holds the Arrow columns, about 8 bytes a token.
    num_foreign, num_blocked, num_too_long: rows left out; a row counts once, in this order.
    """

    def __init__(self, batches: Sequence[pyarrow.RecordBatch], counts: Iterable[int]) -> None:
        self._batches = [batch for batch in batches if batch.num_rows]
        self.num_foreign, self.num_blocked, self.num_too_long = (int(count) for count in counts)
        columns = [batch.column("key").to_numpy(zero_copy_only=False) for batch in self._batches]
        keys = np.concatenate(columns).astype("S") if columns else np.empty(0, "S1")
        # Sorts, and takes one of two rows of one key, which two writers may add at the same time.
        self._keys, order = np.unique(keys, return_index=True)
        ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        self._batch_at = np.searchsorted(ends, order, side="right")
        self._row_at = order - np.concatenate([[0], ends])[self._batch_at]

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | list[Trajectory]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return read_trajectory(self._batches[self._batch_at[index]], int(self._row_at[index]))

    def key(self, index: int) -> str:
        """The key of one sample, under which the store may keep the teacher's targets."""
        return str(self._keys[index], "ascii")

    def to_table(self) -> pyarrow.Table:
        """All samples in order, with their keys and the columns of TRAJECTORY_SCHEMA."""
        starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        order = starts[self._batch_at] + self._row_at
        return pyarrow.Table.from_batches(self._batches).take(pyarrow.array(order))

    @property
    def num_response_tokens(self) -> int:
        """Response tokens of all rows; a sample that was written twice counts twice."""
        return sum(int(pc.sum(_num_response(batch)).as_py()) for batch in self._batches)


def read_trajectories(
    folder: Path, tokenizer_fingerprint: str, selection: Selection | None = None
) -> StoredTrajectories:
    """The selected samples of a store; parts are filtered one at a time.

    Raises: DataError if the store is missing or empty, its token ids are of another tokenizer, or
        no sample is selected; the message says what the store holds.
    """
    selection = selection or Selection()
    parts = find_parts(trajectory_folder(folder))
    if not parts:
        actual = "has no samples" if folder.is_dir() else "does not exist"
        raise DataError(
            f"data.trajectory_store: the store {folder.absolute()} {actual}. Fill it with "
            "`distill-system generate` and the same configuration, or give another folder"
        )
    for part in parts:
        require_tokenizer(part, tokenizer_fingerprint)
    batches: list[pyarrow.RecordBatch] = []
    counts = np.zeros(3, np.int64)
    for part in parts:
        for batch in _batches(part):
            kept, left_out = _select(batch, selection)
            batches.append(kept)
            counts += left_out
    found = StoredTrajectories(batches, counts)
    if not found:
        raise DataError(_nothing_left(folder, parts, selection, found))
    return found


def _batches(part: Path) -> Iterator[pyarrow.RecordBatch]:
    with open_part(part) as opened:
        yield from opened.iter_batches(columns=list(_NEEDED))


def _select(
    batch: pyarrow.RecordBatch, selection: Selection
) -> tuple[pyarrow.RecordBatch, list[int]]:
    """The selected rows; the numbers of foreign, blocked and too long ones."""
    foreign = _is_foreign(batch, selection)
    blocked = _is_in(batch.column("prompt_key"), selection.blocked) & ~foreign
    too_long = _is_too_long(batch, selection) & ~foreign & ~blocked
    wanted = batch.filter(pyarrow.array(~(foreign | blocked | too_long)))
    kept = wanted.select(["key", *TRAJECTORY_SCHEMA.names])
    return kept, [int(mask.sum()) for mask in (foreign, blocked, too_long)]


def _is_foreign(batch: pyarrow.RecordBatch, selection: Selection) -> npt.NDArray[np.bool_]:
    foreign = np.zeros(batch.num_rows, np.bool_)
    if selection.origin is not None:
        foreign |= np.asarray(pc.not_equal(batch.column("policy_key"), selection.origin.policy_key))
    if selection.keys is not None:
        foreign |= ~_is_in(batch.column("key"), selection.keys)
    return foreign


def _is_in(column: pyarrow.Array, keys: Collection[str]) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.is_in(column, value_set=pyarrow.array(list(keys), pyarrow.string())))


def _is_too_long(batch: pyarrow.RecordBatch, selection: Selection) -> npt.NDArray[np.bool_]:
    too_long = np.zeros(batch.num_rows, np.bool_)
    if selection.max_prompt_tokens is not None:
        too_long |= np.asarray(batch.column("num_prompt_tokens")) > selection.max_prompt_tokens
    if selection.max_response_tokens is not None:
        too_long |= np.asarray(_num_response(batch)) > selection.max_response_tokens
    return too_long


def _num_response(batch: pyarrow.RecordBatch) -> pyarrow.Array:
    lengths = pc.list_value_length(batch.column("token_ids"))
    return pc.subtract(lengths, batch.column("num_prompt_tokens"))


def _nothing_left(
    folder: Path, parts: Sequence[Path], selection: Selection, found: StoredTrajectories
) -> str:
    """The message for an empty selection: what was wanted, what the store holds, what to do."""
    if found.num_blocked or found.num_too_long:
        return (
            f"data.trajectory_store: no sample of {folder.absolute()} is left: the prompts of "
            f"{found.num_blocked} also stand in data.held_out or data.evaluation, "
            f"{found.num_too_long} are longer than data.max_prompt_tokens="
            f"{selection.max_prompt_tokens} or rollout.sampling.max_response_tokens="
            f"{selection.max_response_tokens}, {found.num_foreign} are of others. Generate more"
        )
    origin = selection.origin
    if origin is None:
        return f"{folder.absolute()}: none of the samples asked for is among {_describe(parts)}"
    wanted = ", ".join(f"{name} {getattr(origin, name)}" for name in _SHOWN)
    return (
        f"data.trajectory_store: expected samples of {wanted}, stop tokens "
        f"{list(origin.stop_token_ids)}; {folder.absolute()} holds {_describe(parts)}. Run "
        "`distill-system generate` with this configuration, or give the teacher and "
        "rollout.sampling that the store was made with"
    )


def _describe(parts: Sequence[Path]) -> str:
    """The origins of the parts' rows and how many rows each has, the most frequent first."""
    tables = []
    for part in parts:
        with open_part(part) as opened:
            tables.append(opened.read(columns=list(_SHOWN)))
    counted = pyarrow.concat_tables(tables).group_by(list(_SHOWN)).aggregate([([], "count_all")])
    rows = counted.sort_by([("count_all", "descending")]).to_pylist()
    origins = [
        f"{row['count_all']} of {', '.join(f'{name} {row[name]}' for name in _SHOWN)}"
        for row in rows[:MOST_SHOWN]
    ]
    return "; ".join(origins) + ("" if len(rows) <= MOST_SHOWN else f"; {len(rows)} kinds in all")
