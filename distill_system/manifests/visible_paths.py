"""Which files a run reads, and whether its pods can see them: all must lie on the shared volume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from distill_system.config import RunConfig
from distill_system.config.data import (
    DatasetsSource,
    FilesSource,
    JsonlSource,
    ParquetSource,
    PretrainedTokenizer,
)
from distill_system.data.tokenizers import is_template_text
from distill_system.errors import ConfigError


def check_paths(config: RunConfig, mount_path: str) -> None:
    """Refuse paths that pods cannot see.

    mount_path: where the pods have the shared volume.
    Raises: ConfigError that names every such key at once.
    """
    volume = PurePosixPath(mount_path)
    hidden = [
        f"{key}: {path}"
        for key, path in (*_file_paths(config), *_paths_unless_of_the_hub(config))
        if not PurePosixPath(path).is_relative_to(volume) or ".." in PurePosixPath(path).parts
    ]
    if hidden:
        raise ConfigError(
            f"pods see the shared volume alone, at {mount_path} (--mount-path): expected absolute "
            f"paths below it or names of the hub, got {'; '.join(hidden)}. Copy the files to the "
            f"volume and give their place there, such as data.directory={mount_path}/data"
        )


def _file_paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Key and path of what can only be a file or a folder; those of data from data.directory."""
    data, directory = config.data, PurePosixPath(config.data.directory)
    if config.runs_directory.startswith("/"):  # a relative one is made below the volume
        yield "runs_directory", config.runs_directory
    if data.trajectory_store is not None:
        yield "data.trajectory_store", str(directory / data.trajectory_store)
    if data.chat_template is not None and not is_template_text(data.chat_template):
        yield "data.chat_template", str(directory / data.chat_template)
    for key, source in config.data.sources.items():
        if isinstance(source, FilesSource | JsonlSource | ParquetSource):
            paths = (source.path,) if isinstance(source.path, str) else source.path
            yield from ((f"{key}.path", str(directory / path)) for path in paths)


def _paths_unless_of_the_hub(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Key and path of models and data sets that are folders or files, not names of the hub."""
    named = {"teacher.path": config.teacher.path, "student.path": config.student.path}
    if isinstance(config.tokenizer, PretrainedTokenizer):
        named["tokenizer.path"] = config.tokenizer.path
    for key, source in config.data.sources.items():
        if isinstance(source, DatasetsSource):
            named[f"{key}.name"] = source.name
    for key, name in named.items():
        if name is not None and (name.startswith((".", "/")) or Path(name).exists()):
            yield key, name
