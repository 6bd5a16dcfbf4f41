"""Reads the training part of a checkpoint without executing anything that a file asks for.

torch's distributed checkpoint keeps its table of contents (`.metadata`) and what is no tensor
(settings of optimizers) as pickles, and a pickle can name any function to be called as it is read.
Here a table may name the few classes that such a table consists of, and an entry plain values.
"""

from __future__ import annotations

import pickle
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import metadata as forms
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout

from distill_system.errors import RunStateError

_FORMS = (
    forms.Metadata,
    forms.TensorStorageMetadata,
    forms.BytesStorageMetadata,
    forms.ChunkStorageMetadata,
    forms.TensorProperties,
    forms._MEM_FORMAT_ENCODING,
    forms.MetadataIndex,
    forms.StorageMeta,
    _StorageInfo,
    torch.Size,
    _get_layout,
)
ALLOWED: dict[tuple[str, str], Any] = {
    **{(form.__module__, form.__name__): form for form in _FORMS},
    # Where the checkpoint was written; what it is in Python up to 3.12, and since.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}
"""Module and name, as a pickle gives them -> what they stand for; types of numbers come on top."""


class TrainingReader(FileSystemReader):
    """Reads a folder's table of contents by the list of what may stand in one."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> forms.Metadata:
        """The table of contents.

        Raises: RunStateError if it holds anything else; nothing of it has been executed then.
        """
        metadata = read_table(Path(self._get_metadata_path(kwargs.get("rank"))))
        metadata.storage_meta = metadata.storage_meta or forms.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class TrainingPlanner(DefaultLoadPlanner):
    """Reads entries that are no tensors as plain values."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Put one entry where it belongs.

        Raises: RunStateError if it is more than numbers, texts, lists and the like.
        """
        try:
            plain = torch.load(value, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise RunStateError(
                f"its entry {read_item.dest_index.fqn} is no plain value, which is all that a run "
                "writes there: the file was altered, or is not this run's"
            ) from error
        again = BytesIO()
        torch.save(plain, again)
        again.seek(0)
        super().load_bytes(read_item, again)


def read_table(path: Path) -> forms.Metadata:
    """The table of contents in a `.metadata` file; see TrainingReader."""
    try:
        with path.open("rb") as file:
            metadata = _TableReader(file).load()
    except OSError:
        raise
    except Exception as error:  # a broken pickle may raise anything; it has called nothing of ours
        _refuse(path, f"{type(error).__name__}: {error}", error)
    if not (
        isinstance(metadata, forms.Metadata)
        and isinstance(metadata.state_dict_metadata, dict)
        and isinstance(metadata.storage_data, dict)
    ):
        _refuse(path, f"a {type(metadata).__name__}")
    outside = [
        info.relative_path
        for info in metadata.storage_data.values()
        if PurePosixPath(info.relative_path).name != info.relative_path
    ]
    if outside:
        _refuse(path, f"a file outside of its folder, {outside[0]!r}")
    return metadata


class _TableReader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        """What a name in the file stands for."""
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _refuse(path: Path, found: str, error: Exception | None = None) -> NoReturn:
    raise RunStateError(
        f"{path}: expected the table of a checkpoint as a run writes it, got another ({found}); "
        "nothing of it was executed. The file was altered, or is not this run's: put the right one "
        "back, or remove the checkpoint's folder and --resume to go on from the one before"
    ) from error
