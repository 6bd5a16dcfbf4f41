"""What Ray would print into the driver's terminal stands in the run's driver log instead.

A lost worker is one line of ours there. Ray adds a paragraph of its own, and the whole traceback of
every failed call that nobody waits for any more.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any

import ray._private.worker as ray_worker

from distill_system.logs import LOGGER_NAME


class RayMessages:
    """Takes Ray's messages between `begin` and `end`.

    Ray has no public switch for them: two functions of its driver are replaced, by name.
    """

    def __init__(self) -> None:
        self._before = (ray_worker.print_worker_logs, ray_worker._unhandled_error_handler)

    def begin(self) -> None:
        """From now on they are logged."""
        ray_worker.print_worker_logs = _log_lines
        ray_worker._unhandled_error_handler = _log_unread_failure

    def end(self) -> None:
        """From now on Ray prints them again."""
        ray_worker.print_worker_logs, ray_worker._unhandled_error_handler = self._before


@contextmanager
def logged_stderr() -> Iterator[None]:
    """Log what C++ code writes to standard error during a block, which no Python code could catch.

    Keep the block short: what other threads print meanwhile is logged too.
    """
    with TemporaryFile() as written:
        kept = os.dup(2)
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written.read().decode(errors="replace").splitlines():
                logging.getLogger(LOGGER_NAME).info("Ray says: %s", line)


def _log_lines(data: dict[str, Any], print_file: Any, ignore_prefix: bool = False) -> None:
    for line in data.get("lines", ()):
        logging.getLogger(LOGGER_NAME).warning("Ray says: %s", " ".join(str(line).split()))


def _log_unread_failure(error: Exception) -> None:
    said = str(error).strip().splitlines()
    logging.getLogger(LOGGER_NAME).info(
        "a call that nobody waits for any more failed: %s", said[-1] if said else repr(error)
    )
