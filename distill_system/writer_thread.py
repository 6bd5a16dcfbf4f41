"""Work that may hang, done in order by a thread of its own: a disk or a server that does not answer
holds up whoever asked for no longer than they allow.

The thread begins with the first work and ends with the last. It keeps no process alive.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

Result = TypeVar("Result")

PATIENCE_SECONDS = 0.5
"""How long `offer` waits, so that where nothing hangs the work is done when it returns."""


class WriterThread:
    """Does one piece of work after the other, in the order of asking; threads may share it.

    name: of the thread, for whoever looks at a process.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Hashable, Callable[[], Any], Future[Any]]] = deque()
        self._is_running = False
        self._began: float | None = None
        self._was_slow = False

    def submit(self, work: Callable[[], Result], *, key: Hashable = None) -> Future[Result]:
        """Do this after what was asked for before; returns at once.

        key: of work that need not be done again where the same has not begun yet.
        """
        done: Future[Result] = Future()
        with self._lock:
            if key is not None:
                for same in (waiting for other, _, waiting in self._waiting if other == key):
                    return same
            self._waiting.append((key, work, done))
            begins, self._is_running = not self._is_running, True
        if begins:
            try:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
            except RuntimeError:  # the interpreter ends, and begins no more threads
                self._work()
        return done

    def offer(self, work: Callable[[], Result], *, key: Hashable = None) -> Future[Result]:
        """As submit, and wait until it is done: PATIENCE_SECONDS at most, and not at all while the
        thread is known to be slow."""
        is_slow = self._was_slow or self.busy_seconds > PATIENCE_SECONDS
        done = self.submit(work, key=key)
        if not is_slow and not is_done(done, PATIENCE_SECONDS):
            self._was_slow = True
        return done

    @property
    def num_waiting(self) -> int:
        """Pieces of work that have not begun."""
        return len(self._waiting)

    @property
    def busy_seconds(self) -> float:
        """How long the work under way has taken so far; 0 where there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_running = False
                    return
                _, work, done = self._waiting.popleft()
            if done.set_running_or_notify_cancel():
                self._do(work, done)

    def _do(self, work: Callable[[], Any], done: Future[Any]) -> None:
        self._began = began = time.monotonic()
        try:
            result = work()
        except BaseException as error:  # whoever asked meets it
            failure: BaseException | None = error
        else:
            failure = None
        self._was_slow, self._began = time.monotonic() - began > PATIENCE_SECONDS, None
        if failure is None:
            done.set_result(result)
        else:
            done.set_exception(failure)


def is_done(work: Future[Any], seconds: float) -> bool:
    """Whether it is done, or becomes so within these seconds."""
    return bool(wait([work], timeout=max(0.0, seconds)).done)
