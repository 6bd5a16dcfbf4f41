"""Where every file of a run lies, and how one is written so that no crash leaves half of it."""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path

from distill_system.errors import RunStateError


class RunDirectory:
    """The folder of one run; each property names one of its files or folders.

    Nothing is created by asking for a name; whoever writes makes the folders it needs.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def environment_path(self) -> Path:
        """Versions, git commit, machine and seeds."""
        return self.path / "environment.json"

    @property
    def metrics_path(self) -> Path:
        """Every metric of every step, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def prompts_path(self) -> Path:
        """Which prompts each step was trained on, one JSON object a line."""
        return self.path / "prompts.jsonl"

    @property
    def tensorboard_directory(self) -> Path:
        """The same metrics for TensorBoard, a folder per stage."""
        return self.path / "tensorboard"

    @property
    def tokenizer_directory(self) -> Path:
        """The tokenizer in Hugging Face form."""
        return self.path / "tokenizer"

    @property
    def teacher_directory(self) -> Path:
        """The teacher after its supervised fine-tuning."""
        return self.path / "teacher"

    @property
    def student_sft_directory(self) -> Path:
        """The student after its supervised fine-tuning, before distillation."""
        return self.path / "student_sft"

    @property
    def student_directory(self) -> Path:
        """The final student, exported in Hugging Face form."""
        return self.path / "student"

    @property
    def checkpoints_directory(self) -> Path:
        """Checkpoints of all stages."""
        return self.path / "checkpoints"

    @property
    def evaluations_directory(self) -> Path:
        """One file per evaluation."""
        return self.path / "evaluations"

    def evaluation_path(self, label: str) -> Path:
        """The evaluation of this label: teacher, before, after or step_000100."""
        return self.evaluations_directory / f"{label}.json"

    @property
    def timings_path(self) -> Path:
        """Seconds and tokens per stage and phase."""
        return self.path / "timings.json"

    @property
    def summary_path(self) -> Path:
        """The run's figures for programs."""
        return self.path / "summary.json"

    @property
    def report_path(self) -> Path:
        """The run's figures for people."""
        return self.path / "report.html"


def write_text(path: Path, text: str) -> None:
    """Write beside, flush to the disk, rename: a reader sees the old file or the new, never a part.

    Raises:
        OSError: the disk is full or the folder is not writable; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    flush_folder(path.parent)


def remove_half_written(folder: Path) -> None:
    """Remove what write_text had beside the files below a folder when its process was killed."""
    for path in folder.rglob(".*"):
        if re.fullmatch(r"\..+\.\d+\.\d+", path.name) and path.is_file():
            path.unlink()


def flush_folder(folder: Path) -> None:
    """The rename itself is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_half_line(path: Path) -> None:
    """Cut off a last line without its end, which a crash left; nothing where there is no file."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, as write_text does; NaN and infinities, which JSON lacks, as null."""
    text = json.dumps(without_non_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def without_non_finite(value: object) -> object:
    """The value with null in place of every NaN or infinite float, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(item) for item in value]
    return value


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in a file of the run.

    Raises:
        RunStateError: there is no such file, or it does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunStateError(f"{path} is missing: is {path.parent} a run's folder?") from error
    except json.JSONDecodeError as error:
        raise RunStateError(f"{path} is not JSON ({error}): delete it and run again") from error
    if not isinstance(value, dict):
        raise RunStateError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
