"""Where a run's models come from: folders, names of the hub, .gguf files that become folders."""

from __future__ import annotations

from pathlib import Path

from distill_system.config import RunConfig
from distill_system.config.model import ModelConfig
from distill_system.errors import ModelError
from distill_system.language_model import convert_gguf, is_gguf
from distill_system.observe import RunDirectory


def find_gguf_files(config: RunConfig) -> list[str]:
    """The .gguf files among the run's models."""
    paths = (config.teacher.path, config.student.path)
    return [path for path in paths if path is not None and is_gguf(path)]


def with_folders(config: RunConfig, run: RunDirectory) -> RunConfig:
    """The configuration with a folder in place of each .gguf file, converted the first time.

    Raises: ModelError naming the key, for a file that cannot be read.
    """
    for role in ("teacher", "student"):
        model: ModelConfig = getattr(config, role)
        if model.path is not None and is_gguf(model.path):
            folder = run.models_directory / role
            if not folder.exists():
                _convert(f"{role}.path", Path(model.path), folder)
            own = model.model_copy(update={"path": str(folder)})
            config = config.model_copy(update={role: own})
    return config


def _convert(key: str, file: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        convert_gguf(file, folder)
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error
