"""The paths of a configuration, as the cluster will read them.

A job runs in a folder of the cluster's own, so that a relative path would mean something else
there: what exists here is written in full, and nothing of it is sent.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_system.config import RunConfig
from distill_system.config.data import (
    DataConfig,
    DatasetsSource,
    EmbeddedSource,
    FilesSource,
    PretrainedTokenizer,
)
from distill_system.data.tokenizers import is_template_text
from distill_system.run.preparation import require_lasting_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPaths:
    """A configuration that means the same in every folder.

    written_out: a line for each path that was relative.
    absent: the paths, each with its key, that do not exist on this machine.
    """

    config: RunConfig
    written_out: tuple[str, ...]
    absent: tuple[str, ...]


def write_out_paths(config: RunConfig) -> ClusterPaths:
    """Write every relative path of the configuration in full.

    Raises: ConfigError for a relative runs_directory, which would be lost with the job's folder.
    """
    require_lasting_folder(config)
    lines: list[str] = []
    update: dict[str, Any] = {"data": _data(config.data, lines)}
    for role in ("teacher", "student"):
        model = getattr(config, role)
        update[role] = model.model_copy(
            update={"path": _folder_or_name(f"{role}.path", model.path, lines)}
        )
    if isinstance(config.tokenizer, PretrainedTokenizer):
        path = _folder_or_name("tokenizer.path", config.tokenizer.path, lines)
        update["tokenizer"] = config.tokenizer.model_copy(update={"path": path})
    written = config.model_copy(update=update)
    return ClusterPaths(config=written, written_out=tuple(lines), absent=tuple(_absent(written)))


def _data(data: DataConfig, lines: list[str]) -> DataConfig:
    update: dict[str, str] = {}
    if any(not Path(path).is_absolute() for _, path in _data_paths(data)):
        update["directory"] = _folder("data.directory", data.directory, lines)
    if data.cache_directory is not None:
        update["cache_directory"] = _folder("data.cache_directory", data.cache_directory, lines)
    return data.model_copy(update=update)


def _folder(key: str, path: str, lines: list[str]) -> str:
    """The path in full, with a line about it if it was not."""
    if Path(path).is_absolute():
        return path
    whole = str(Path(path).absolute())
    lines.append(f"{key}: {path} is read on the cluster as {whole}")
    return whole


def _folder_or_name(key: str, path: str | None, lines: list[str]) -> str | None:
    """A folder in full; the name of a hub as it is."""
    if path is None or not Path(path).exists():
        return path
    return _folder(key, path, lines)


def _absent(config: RunConfig) -> Iterator[str]:
    """Each path in full that is not on this machine, with its key."""
    named = {f"{role}.path": getattr(config, role).path for role in ("teacher", "student")}
    if isinstance(config.tokenizer, PretrainedTokenizer):
        named["tokenizer.path"] = config.tokenizer.path
    every = [(key, path) for key, path in named.items() if path and Path(path).is_absolute()]
    directory = config.data.directory
    every += [(key, str(Path(directory) / path)) for key, path in _data_paths(config.data)]
    return (f"{key}={path}" for key, path in every if not glob.glob(path))


def _data_paths(data: DataConfig) -> Iterator[tuple[str, str]]:
    """What the data section reads from files, by key; relative ones start at data.directory."""
    if data.trajectory_store is not None:
        yield "data.trajectory_store", data.trajectory_store
    if data.chat_template is not None and not is_template_text(data.chat_template):
        yield "data.chat_template", data.chat_template
    for key, source in data.sources.items():
        if isinstance(source, DatasetsSource):
            if (Path(data.directory) / source.name).is_dir():
                yield f"{key}.name", source.name
        elif isinstance(source, FilesSource) and isinstance(source.path, tuple):
            yield from ((f"{key}.path", path) for path in source.path)
        elif not isinstance(source, EmbeddedSource):
            yield f"{key}.path", str(source.path)
