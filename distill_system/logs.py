"""The log files of a run: one for the driver, one for each worker, in the run's folder.

    logs/driver.log               what the driver noted, and the error that ended it
    logs/student_rollout-0.log    when that worker began, had loaded its model, or failed; where
                                  Ray keeps what its process writes besides

Lines for people, or JSON objects with `logging.json_lines`. Later lives of a run append.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from distill_system.errors import RunStateError
from distill_system.writer_thread import WriterThread

LOGGER_NAME = "distill_system"

DRIVER = "driver"

MOST_WAITING_LINES = 10_000
"""Of a log whose disk hangs; those after them are lost."""

_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [A-Z]+  (.*)")

_FOLDER, _LEVEL, _FORM = (f"DISTILL_SYSTEM_LOG_{name}" for name in ("FOLDER", "LEVEL", "FORM"))


def log_path(folder: Path, name: str) -> Path:
    """The log file of the driver, or of a worker such as student_rollout-0."""
    return folder / f"{name}.log"


def log_environment(folder: Path, *, level: str, json_lines: bool) -> dict[str, str]:
    """The variables by which a worker's process knows where to write; see open_worker_log."""
    return {_FOLDER: str(folder), _LEVEL: level, _FORM: "json" if json_lines else "text"}


@contextmanager
def logged_start(
    name: str, place: str, environment: Mapping[str, str] = os.environ
) -> Iterator[None]:
    """Open this worker's log, if the run said where, and log how the block ends, which loads it.

    The log stays open until the process ends.
    name: the worker's.  place: where its process is, and what else it writes.
    Raises: RunStateError if the run's folder is not to be seen from here.
    """
    if _FOLDER in environment:
        _require_folder(name, Path(environment[_FOLDER]).parent)
        path = log_path(Path(environment[_FOLDER]), name)
        as_json = environment.get(_FORM) == "json"
        open_log(path, level=environment.get(_LEVEL, "info"), json_lines=as_json)
    logger, began = logging.getLogger(LOGGER_NAME), time.monotonic()
    logger.info("%s begins: %s", name, place)
    try:
        yield
    except BaseException:
        logger.exception("%s could not start", name)
        raise
    logger.info("%s is ready after %.1f s", name, time.monotonic() - began)


def open_log(path: Path, *, level: str, json_lines: bool) -> logging.Handler | None:
    """Write what this process logs to a file too, from now on; an earlier life's lines stay.

    level: debug, info, warning or error; lines below it are left out.
    Returns what close_log takes; None where the file cannot be written: no run ends for that.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError:
        return None
    handler = _FileHandler(path)
    handler.setFormatter(_JsonLine() if json_lines else _Line())
    handler.setLevel(level.upper())
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(min(logger.level or handler.level, handler.level))
    logger.addHandler(handler)
    return handler


def _require_folder(name: str, folder: Path) -> None:
    """Ranks write checkpoints there and workers read models: told now, and not in hours."""
    if not folder.is_dir():
        raise RunStateError(
            f"{name} on {socket.gethostname()}: the run's folder {folder} is not there. Workers on "
            "several nodes need a runs_directory on storage that every node has under one path"
        )


def close_log(handler: logging.Handler | None) -> None:
    """Write no more lines to what open_log opened."""
    if handler is not None:
        logging.getLogger(LOGGER_NAME).removeHandler(handler)
        handler.close()


def name_logs(error: Exception, folder: Path) -> None:
    """Let a message name the logs of the workers that it speaks of, where there are any."""
    text = str(error)
    names = dict.fromkeys(re.findall(r"\b[a-z_]+-\d+\b", text))
    paths = [str(path) for name in names if (path := log_path(folder, name)).is_file()]
    if paths:
        error.args = (f"{text.rstrip('. ')}. Log: {', '.join(paths)}", *error.args[1:])


def last_message(path: Path) -> str:
    """The last line's message, of either form; "" if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        message = _message_of(line)
        if message:
            return message
    return ""


def _message_of(line: str) -> str:
    try:
        return str(json.loads(line)["message"])
    except (ValueError, KeyError, TypeError):
        found = _LINE.match(line)
        return found[1] if found else ""


class _FileHandler(logging.Handler):
    """Appends lines to a file; a disk that hangs holds up nobody, one that fails loses lines."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._thread = WriterThread("log")

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if self._thread.num_waiting < MOST_WAITING_LINES:
            line = self.format(record) + "\n"
            self._thread.offer(lambda: self._append(line))

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line)


class _Line(logging.Formatter):
    """2026-11-27 05:40:01 INFO  message; a traceback is indented below it."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        text = f"{clock} {record.levelname}  {record.getMessage()}"
        below = _traceback_of(record)
        return text + "".join(f"\n    {line}" for line in below.splitlines())


class _JsonLine(logging.Formatter):
    """One object a line: time, level, logger, message, and traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        row = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        below = _traceback_of(record)
        return json.dumps(row | ({"traceback": below} if below else {}), ensure_ascii=False)


def _traceback_of(record: logging.LogRecord) -> str:
    return "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
