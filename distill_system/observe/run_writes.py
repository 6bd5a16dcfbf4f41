"""The writes of a run's driver: one thread does them in order, so that no step waits for a disk.

What the run can do without is tried: a failure, or a disk that does not answer, is told once and
counted, and tried again later; that it works again is told too. What the run cannot do without is
waited for, until a deadline. A checkpoint comes after all that was asked for before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from distill_system.errors import RunStateError
from distill_system.observe.run_directory import write_text
from distill_system.writer_thread import WriterThread, is_done

Result = TypeVar("Result")

HANG_SECONDS = 30.0
"""A write that takes longer hangs: it is told, and the end of the run waits for no more of them."""


class RunWrites:
    """What the disk has not taken yet, and how often it refused; threads may share it.

    notify: takes a line for the person.  seconds: what the run cannot do without may take.
    """

    def __init__(self, notify: Callable[[str], None] = print, *, seconds: float = 1800.0) -> None:
        self.notify = notify
        self.seconds = seconds
        self._thread = WriterThread("writes")
        self._lock = threading.Lock()
        self._under_way: str | None = None
        self._refused: set[str] = set()
        self._waiting: dict[Path, str] = {}
        self.num_failed = 0

    def attempt(self, what: str, write: Callable[[], None], *, is_last: bool = False) -> bool:
        """Whether this write succeeded; the caller keeps what it could not write, and tries again.

        Where the disk is slow it is not waited for: the write is done later. One that has not begun
        when it is asked for again is done once.

        what: the file, for the person, who is told of the first failure of several in a row.
        write: safe in another thread.  is_last: wait until it is clear that the disk hangs.
        """
        work = partial(self._write, what, write)
        return self._finish(self._thread.offer(work, key=(what, write)), is_last=is_last)

    def require(self, path: Path, work: Callable[[], Result]) -> Result:
        """Do what the run cannot go on without, after everything that was asked for before.

        path: what is written or read, for the person.
        Raises: what `work` raises; RunStateError if the disk does not answer in time.
        """
        done = self._thread.submit(work)
        first = min(HANG_SECONDS, self.seconds)
        if not is_done(done, first):
            self.notify(
                f"{path}: its disk has not answered for {first:.0f} s; the run waits for it, "
                f"{self.seconds:.0f} s at most"
            )
            if not is_done(done, self.seconds - first):
                done.cancel()
                raise no_answer(path, self.seconds)
        return done.result()

    def give_up(self, line: str) -> None:
        """Count a write that is not tried again, and tell the person of it."""
        with self._lock:
            self.num_failed += 1
        self.notify(line)

    def write_text(self, path: Path, text: str) -> None:
        """Replace a file's content, now or, where that fails, at a later `try_again`."""
        with self._lock:
            self._waiting[path] = text
        self.try_again()

    def try_again(self, *, is_last: bool = False) -> None:
        """Write what write_text could not."""
        if self._waiting:
            work = self._write_texts
            self._finish(self._thread.offer(work, key=work), is_last=is_last)

    def close(self) -> None:
        """Try for the last time, and say what is lost."""
        self.try_again(is_last=True)
        for path in self._waiting:
            self.notify(f"{_name(path)} is lost: the disk has not taken it until the end")

    def _finish(self, done: Future[bool], *, is_last: bool) -> bool:
        """Whether a write is done, and succeeded; tells of one that hangs."""
        if is_last:
            is_done(done, HANG_SECONDS - self._thread.busy_seconds)
        what = self._under_way
        is_told = what is None or what in self._refused
        if what is not None and not is_told and self._thread.busy_seconds >= HANG_SECONDS:
            self._refuse(what, f"its disk has not answered for {HANG_SECONDS:.0f} s")
        return done.done() and done.result()

    def _write_texts(self) -> bool:
        """In the thread: the newest content of every file whose content waits."""
        written = [self._write_newest(path) for path in tuple(self._waiting)]
        return all(written)

    def _write_newest(self, path: Path) -> bool:
        text = self._waiting[path]
        is_written = self._write(_name(path), partial(write_text, path, text))
        with self._lock:
            if is_written and self._waiting[path] is text:  # no newer one has come meanwhile
                del self._waiting[path]
        return is_written

    def _write(self, what: str, write: Callable[[], None]) -> bool:
        """In the thread: whether the disk took it."""
        self._under_way = what
        try:
            write()
        except OSError as error:
            self._refuse(what, error.strerror or str(error))
            return False
        finally:
            self._under_way = None
        with self._lock:
            was_refused = what in self._refused
            self._refused.discard(what)
        if was_refused:
            self.notify(f"{what} is written again")
        return True

    def _refuse(self, what: str, reason: str) -> None:
        with self._lock:
            self.num_failed += 1
            is_news = what not in self._refused
            self._refused.add(what)
        if is_news:
            self.notify(
                f"{what} cannot be written ({reason}): the run goes on, and writes it once the "
                "disk takes it again"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def no_answer(path: Path, seconds: float) -> RunStateError:
    """That a disk has not answered for so long."""
    return RunStateError(
        f"{path}: its disk has not answered for {seconds:.0f} s (deadlines.call_seconds), and the "
        "run cannot go on without it. See to the disk, or to the server of its files, then go on "
        "with --resume"
    )


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
