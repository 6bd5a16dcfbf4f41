"""Rows of what the library `datasets` loads: hub names, its folders, and what save_to_disk wrote.

In: a configured source.  Out: a memory-mapped table, whose rows are read a few thousand at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_system.config.data import DatasetsSource
from distill_system.data.row_files import ROWS_PER_READ, NamedRows
from distill_system.data.row_values import without_padding
from distill_system.errors import DataError
from distill_system.hub import is_hub_reachable

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTable:
    """A split that `datasets` has loaded.

    table: a datasets.Dataset.  name: how messages call it, e.g. "imdb train".
    """

    table: Any
    name: str

    def columns(self) -> list[str]:
        """Its columns."""
        return list(self.table.column_names)

    def rows(self, columns: Sequence[str] | None = None) -> NamedRows:
        """All rows in order; columns: only these, None reads all."""
        table = self.table if columns is None else self.table.select_columns(list(columns))
        batches = table.with_format("arrow").iter(ROWS_PER_READ)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield f"{self.name}[{number}]", without_padding(row)


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    whole = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return whole or (folder / "dataset_dict.json").is_file()


def load_saved(folder: Path, split: str | None, key: str) -> LoadedTable:
    """A split of a folder that save_to_disk wrote.

    split: None where the folder holds one alone.
    Raises: DataError if the folder cannot be read or has no such split.
    """
    import datasets

    with _naming(f"{key}: {folder}, a folder of save_to_disk, cannot be read"):
        loaded = datasets.load_from_disk(str(folder))
    if not isinstance(loaded, datasets.DatasetDict):
        return LoadedTable(table=loaded, name=folder.name)
    if split is None and len(loaded) == 1:
        split = next(iter(loaded))
    if split not in loaded:
        raise DataError(
            f"{key}: {folder} holds the splits {sorted(loaded)}: expected {key}.split to be one of "
            f"them, got {split!r}"
        )
    return LoadedTable(table=loaded[split], name=f"{folder.name} {split}")


def load_dataset(source: DatasetsSource, directory: Path, key: str) -> LoadedTable:
    """The split that a source names.

    Raises: DataError if there is no such data set, split or subset, or no network to fetch it.
    """
    folder = directory / source.name
    if folder.is_dir() and is_saved(folder):
        return load_saved(folder, source.split, key)
    import datasets  # imported here: it takes a second, and other sources do not need it

    name = str(folder) if folder.is_dir() else source.name
    asked = (
        f"{key}: `datasets` could not load name={name!r}, subset={source.subset!r}, "
        f"folder={source.folder!r}, revision={source.revision!r}, split={source.split!r}"
    )
    _refuse_script(Path(name), asked)
    is_local = folder.is_dir()
    if not is_local and not _HUB_NAME.fullmatch(source.name):
        raise DataError(f"{asked}: there is no such folder, and it is no name of the hub")
    without_network = not is_local and not is_hub_reachable()
    if without_network:
        asked += (
            f": it is no folder ({folder.absolute()}), the hub does not answer, and the cache "
            f"{datasets.config.HF_DATASETS_CACHE} does not hold it. Give a folder or files of this "
            "machine (type: files), or load it once where there is a network. `datasets` says"
        )
    with _naming(asked), _offline(without_network):
        table = datasets.load_dataset(
            name,
            source.subset,
            data_dir=source.folder,
            split=source.split,
            revision=source.revision,
        )
    return LoadedTable(table=table, name=f"{source.name} {source.split}")


def _refuse_script(folder: Path, asked: str) -> None:
    script = folder / f"{folder.name}.py"
    if script.is_file():
        raise DataError(
            f"{asked}: {script} is a loading script, which `datasets` no longer runs. Give the "
            "data files themselves (type: files), or convert it to parquet"
        )


@contextmanager
def _naming(asked: str) -> Iterator[None]:
    import datasets

    try:
        yield
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{asked}: {error}") from error


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Let the libraries look into their caches alone, without trying the network for a minute.

    Their switches are environment variables, which they read once, as they are imported.
    """
    if not wanted:
        yield
        return
    import datasets
    import huggingface_hub

    switched = [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in switched]
    for module, name in switched:
        setattr(module, name, True)
    try:
        yield
    finally:
        for (module, name), value in zip(switched, before, strict=True):
            setattr(module, name, value)
