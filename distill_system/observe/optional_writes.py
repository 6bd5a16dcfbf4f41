"""Writes that a run can do without: where the disk does not take them, the run goes on.

A failure is told once, counted, and tried again later; that it works again is told too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Self

from distill_system.observe.run_directory import write_text


class OptionalWrites:
    """What the disk has not taken yet, and how often it refused; threads may share it.

    notify: takes a line for the person.
    """

    def __init__(self, notify: Callable[[str], None] = print) -> None:
        self.notify = notify
        self._lock = threading.Lock()
        self._refused: set[str] = set()
        self._waiting: dict[Path, str] = {}
        self.num_failed = 0

    def attempt(self, what: str, write: Callable[[], None]) -> bool:
        """Whether this write succeeded; the caller keeps what it could not write, and tries again.

        what: the file, for the person, who is told of the first failure of several in a row.
        """
        try:
            write()
        except OSError as error:
            with self._lock:
                self.num_failed += 1
                is_news = what not in self._refused
                self._refused.add(what)
            if is_news:
                self.notify(
                    f"{what} cannot be written ({error.strerror or error}): the run goes on, and "
                    "writes it once the disk takes it again"
                )
            return False
        with self._lock:
            was_refused = what in self._refused
            self._refused.discard(what)
        if was_refused:
            self.notify(f"{what} is written again")
        return True

    def give_up(self, line: str) -> None:
        """Count a write that is not tried again, and tell the person of it."""
        with self._lock:
            self.num_failed += 1
        self.notify(line)

    def write_text(self, path: Path, text: str) -> None:
        """Replace a file's content, now or, where that fails, at a later `try_again`."""
        with self._lock:
            self._waiting[path] = text
        self.try_again(path)

    def try_again(self, *paths: Path) -> None:
        """Write what write_text could not: of these files, or of all."""
        for path in paths or tuple(self._waiting):
            with self._lock:
                text = self._waiting.get(path)
            if text is None:
                continue
            if self.attempt(_name(path), partial(write_text, path, text)):
                with self._lock:
                    if self._waiting.get(path) is text:  # no newer one has come meanwhile
                        del self._waiting[path]

    def close(self) -> None:
        """Try for the last time, and say what is lost."""
        self.try_again()
        for path in self._waiting:
            self.notify(f"{_name(path)} is lost: the disk has not taken it until the end")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
