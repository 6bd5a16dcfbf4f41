"""A person's wish that a run ends, heard where its state is whole: between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Made by a signal handler, looked at by whoever trains; threads may look too.

    Without a block of `heard` nobody looks: then the signal has to interrupt.
    """

    def __init__(self) -> None:
        self._made = threading.Event()
        self._seconds: float | None = None

    @property
    def is_made(self) -> bool:
        """Whether the run should end after the step under way."""
        return self._made.is_set()

    def make(self) -> float | None:
        """Ask for the end; returns the seconds it may take, None if nobody would hear it.

        Called in the main thread. After these seconds KeyboardInterrupt is raised there.
        """
        if self._seconds is None:
            return None
        self._made.set()
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        return self._seconds

    @contextmanager
    def heard(self, *, seconds: float) -> Iterator[None]:
        """While the block runs, is_made is looked at between two steps.

        seconds: the longest that a step under way and its checkpoint may take.
        """
        self._seconds = seconds
        try:
            yield
        finally:
            self._seconds = None
            if self.is_made and threading.current_thread() is threading.main_thread():
                signal.setitimer(signal.ITIMER_REAL, 0.0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
