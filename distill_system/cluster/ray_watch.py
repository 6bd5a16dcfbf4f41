"""Notices that Ray itself no longer answers, and ends this process where nothing else can.

A stopped or cut-off raylet or gcs_server makes Ray's calls hang in its own code, where no signal
and no exception reaches: neither a deadline nor Ctrl-C would end the run. Everything that a run
needs to go on is on the disk at any moment, as after a kill.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

import psutil
import ray

LOOK_SECONDS = 10.0
"""Between two looks at Ray."""

SILENT_SECONDS = 60.0
"""Ray's control process may be busy for so long, on a machine that is busy with other things."""

SHUT_DOWN_SECONDS = 60.0
"""For Ray to end what it started; a healthy cluster takes less than ten."""

RAY_PROCESSES = ("gcs_server", "raylet")


class RayWatch:
    """Looks in the background whether Ray answers; `end` is called once if it does not.

    end: takes the message; the default ends this process.
    """

    def __init__(self, *, end: Callable[[str], None] | None = None) -> None:
        self._end = end_process if end is None else end
        self._stopped = threading.Event()
        self._ending_since = float("inf")

    def begin(self) -> None:
        """Watch from now on; Ray answers now."""
        self._node = ray.get_runtime_context().get_node_id()
        threading.Thread(target=self._watch, name="watch over Ray", daemon=True).start()

    def stop(self) -> None:
        """Ray has ended."""
        self._stopped.set()

    def expect_end(self) -> None:
        """Ray is being shut down: it may take SHUT_DOWN_SECONDS."""
        self._ending_since = time.monotonic()

    def _watch(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            problem = self._find_problem()
            if problem and not self._stopped.is_set():
                self._end(problem)
                return

    def _is_ending(self) -> bool:
        return self._ending_since < float("inf")

    def _find_problem(self) -> str:
        if self._is_ending():
            late = time.monotonic() - self._ending_since > SHUT_DOWN_SECONDS
            return f"Ray did not shut down within {SHUT_DOWN_SECONDS:g} s" if late else ""
        nodes = ask_for_nodes(SILENT_SECONDS)
        if self._is_ending():
            return ""  # it is shut down meanwhile, and answers no more
        if nodes is None:
            return f"Ray's control process (gcs_server) has not answered for {SILENT_SECONDS:g} s"
        own = [node for node in nodes if node["NodeID"] == self._node]
        if own and not own[0]["Alive"]:
            return "Ray has given this machine up: its raylet does not answer"
        return ""


def ask_for_nodes(seconds: float) -> list[dict[str, object]] | None:
    """The cluster's nodes; None if Ray says nothing for so long."""
    answer: list[list[dict[str, object]]] = []

    def ask() -> None:
        end = time.monotonic() + seconds
        while not answer and time.monotonic() < end:
            try:
                answer.append(ray.nodes())
            except Exception:  # of whatever kind: it does not answer yet, or starts anew
                time.sleep(min(1.0, seconds / 10))

    asking = threading.Thread(target=ask, name="question to Ray", daemon=True)
    asking.start()
    asking.join(seconds)
    return answer[0] if answer else None


def end_process(problem: str) -> None:
    """Say why, end Ray's own processes that this one has started, and end this one."""
    print(
        f"ResourceError: {problem}. The run ends here, as if by a kill; look whether the machine "
        "is out of memory or stopped. --resume continues from the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    for process in psutil.Process().children(recursive=True):
        if process.name() in RAY_PROCESSES:
            process.kill()  # everything else of a local cluster ends with these
    os._exit(1)
