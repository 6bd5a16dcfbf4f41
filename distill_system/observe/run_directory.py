"""The places of a run's files: one is written so that no crash leaves half of it, and read by its
form, so that anything else there is one kind of error.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from distill_system.errors import RunStateError

Content = TypeVar("Content")

MOST_SHOWN = 80
"""Characters of a wrong value that a message shows."""

_OBJECT = TypeAdapter(dict[str, Any])


class RunDirectory:
    """The folder of one run and the places of its files; creates nothing.

    Whoever writes a file makes the folders it needs.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock_path = self.path / "lock"  # while a command writes here: see run_lock
        self.config_path = self.path / "config.json"  # the resolved configuration
        self.environment_path = self.path / "environment.json"  # versions, commit, machine, seeds
        self.metrics_path = self.path / "metrics.jsonl"  # every metric of every step, a row a line
        self.prompts_path = self.path / "prompts.jsonl"  # the prompts of every step, a row a line
        self.faults_path = self.path / "faults.jsonl"  # what was lost and replaced, an event a line
        self.tensorboard_directory = self.path / "tensorboard"  # the metrics, a folder per stage
        self.trackers_path = self.path / "tracking.json"  # the run's names and places in trackers
        self.tokenizer_directory = self.path / "tokenizer"
        self.models_directory = self.path / "models"  # folders made of models in other formats
        self.teacher_directory = self.path / "teacher"  # the teacher after its fine-tuning
        self.student_sft_directory = self.path / "student_sft"  # the student after its fine-tuning
        self.student_directory = self.path / "student"  # the distilled student
        self.checkpoints_directory = self.path / "checkpoints"  # a folder per stage
        self.evaluations_directory = self.path / "evaluations"  # a file per evaluation
        self.logs_directory = self.path / "logs"  # a file for the driver and for each worker
        self.timings_path = self.path / "timings.json"  # seconds and tokens per stage and phase
        self.summary_path = self.path / "summary.json"  # the run's figures for programs
        self.report_path = self.path / "report.html"  # the run's figures for people

    def evaluation_path(self, label: str) -> Path:
        """The evaluation of this label: teacher, before, after or step_000100."""
        return self.evaluations_directory / f"{label}.json"


def write_text(path: Path, text: str) -> None:
    """Replace a file's content: a reader, or a crash, finds the old file or the new, never a part.

    Raises: OSError if the disk is full or the folder is not writable; the old file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name in the same folder, then renamed, which is atomic. The name is
    # unique to this thread, so that two writers of one file do not mix.
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
    """Remove the temporary files of write_text, below a folder, that a killed process left."""
    for path in folder.rglob(".*"):
        if re.fullmatch(r"\..+\.\d+\.\d+", path.name) and path.is_file():
            path.unlink()


def flush_folder(folder: Path) -> None:
    """Flush a folder to the disk: without it a power cut can undo a rename in the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def told_as_unwritable(path: Path) -> Iterator[None]:
    """Turn an error of the file system in a block into one message.

    Raises: RunStateError that names the file, what was wrong and the way out.
    """
    try:
        yield
    except OSError as error:
        raise RunStateError(
            f"{path} cannot be written: {error.strerror or error}. Make room on its disk, or mend "
            "its permissions, and give the same command again"
        ) from error


def drop_half_line(path: Path) -> None:
    """Cut off a last line without a newline, which a crash left; does nothing without the file."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON with write_text; see to_json."""
    write_text(path, to_json(value))


def to_json(value: object) -> str:
    """The content of a JSON file; NaN and infinities, which JSON lacks, become null."""
    plain = without_non_finite(value)
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def without_non_finite(value: object) -> object:
    """The value with null in place of every NaN or infinite float, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(item) for item in value]
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of the run of which no form is asked.

    Raises: RunStateError if there is no such file, or it does not hold a JSON object.
    """
    return read_form(path, _OBJECT, way_out="Delete it and run again")


def read_form(path: Path, form: TypeAdapter[Content], *, way_out: str) -> Content:
    """The JSON in a file.

    form: what it must be; read strictly, so that no text passes for a number.
    way_out: what to do about a broken file, a sentence for the message.
    Raises: RunStateError if there is no such file, or it cannot be read, or is of another form.
    """
    content = read_form_if_exists(path, form, way_out=way_out)
    if content is None:
        raise RunStateError(f"{path} is missing: is {path.parent} a run's folder?")
    return content


def read_form_if_exists(path: Path, form: TypeAdapter[Content], *, way_out: str) -> Content | None:
    """As read_form; None if there is no such file."""
    text = read_bytes_if_exists(path, way_out=way_out)
    return None if text is None else parse_form(text, form, place=str(path), way_out=way_out)


def read_bytes_if_exists(path: Path, *, way_out: str) -> bytes | None:
    """A file's bytes; None if there is no such file.

    Raises: RunStateError if it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = "a folder stands there" if path.is_dir() else error.strerror
        raise RunStateError(f"{path} cannot be read: {reason}. {way_out}") from error


def parse_form(text: bytes, form: TypeAdapter[Content], *, place: str, way_out: str) -> Content:
    """The content of a JSON text.  place: where it stands, for the message."""
    try:
        return form.validate_json(text, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]  # the first is enough for a person
        if found["type"] == "json_invalid":
            shown = _cut(text.decode(errors="replace"))
            said = f"{place} is not JSON ({found['ctx']['error']}): {shown}"
        else:
            key = "".join(f", {part}" for part in found["loc"])
            got = "" if found["type"] == "missing" else f", got {_cut(repr(found['input']))}"
            said = f"{place}{key}: {found['msg']}{got}"
        raise RunStateError(f"{said}. {way_out}") from error


def _cut(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
