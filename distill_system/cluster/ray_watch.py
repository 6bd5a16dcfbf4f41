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
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from distill_system.errors import ConfigError

LOOK_SECONDS = 10.0
"""Between two looks at Ray."""

SILENT_SECONDS = 60.0
"""Ray's control process may be busy for so long, on a machine that is busy with other things."""

RAY_WAITS = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""The variable by which Ray's processes are told how long a head may be gone; 60 s without it."""

HEAD_WITHOUT_TABLES = (
    "Ray's head has come back without its tables, as a new cluster (a head that is to be survived "
    "keeps them in Redis: docs/fault-tolerance.md)"
)

SHUT_DOWN_SECONDS = 60.0
"""For Ray to end what it started; a healthy cluster takes less than ten."""

RAY_PROCESSES = ("gcs_server", "raylet")


class RayWatch:
    """Looks in the background whether Ray answers; `end` is called once if it does not.

    A head is waited for as long as Ray's own processes wait for it, and SILENT_SECONDS at least.
    end: takes the message; the default ends this process.
    """

    def __init__(self, *, end: Callable[[str], None] | None = None) -> None:
        self._end = end_process if end is None else end
        self._patience = max(SILENT_SECONDS, _seconds_that_ray_waits())
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
        try:
            nodes = ask_for_nodes(self._patience)
        except ClusterGoneError as error:
            return "" if self._is_ending() else str(error)
        if self._is_ending():
            return ""  # it is shut down meanwhile, and answers no more
        if nodes is None:
            return f"Ray's control process (gcs_server) has not answered for {self._patience:g} s"
        own = [node for node in nodes if node["NodeID"] == self._node]
        if own and not own[0]["Alive"]:
            return "Ray has given this machine up: its raylet does not answer"
        return ""


def _seconds_that_ray_waits() -> float:
    """What the environment says.  Raises: ConfigError for no number."""
    told = os.environ.get(RAY_WAITS, "0")
    try:
        return float(told)
    except ValueError as error:
        raise ConfigError(f"{RAY_WAITS}={told!r}: expected a number of seconds") from error


class ClusterGoneError(Exception):
    """Ray's head answers for another cluster than the one that this process has joined."""


def ask_for_nodes(seconds: float) -> list[dict[str, object]] | None:
    """The cluster's nodes; None if Ray says nothing for so long.

    Raises: ClusterGoneError.
    """
    answer: list[list[dict[str, object]] | ClusterGoneError] = []

    def ask() -> None:
        end = time.monotonic() + seconds
        while not answer and time.monotonic() < end:
            try:
                answer.append(read_nodes(seconds))
            except Exception as error:  # of whatever kind: it does not answer yet, or starts anew
                if "WrongClusterID" in str(error):
                    answer.append(ClusterGoneError(HEAD_WITHOUT_TABLES))
                time.sleep(min(1.0, seconds / 10))

    asking = threading.Thread(target=ask, name="question to Ray", daemon=True)
    asking.start()
    asking.join(seconds)
    first = answer[0] if answer else None
    if isinstance(first, ClusterGoneError):
        raise first
    return first


def read_nodes(seconds: float) -> list[dict[str, object]]:
    """Id (NodeID) and state (Alive) of each node.

    ray.nodes() would abort this process where the head has come back without its tables.
    Raises: whatever Ray raises where its head does not answer.
    """
    client = ray._private.worker.global_worker.gcs_client
    nodes = client.get_all_node_info(timeout=seconds)
    return [
        {"NodeID": node_id.hex(), "Alive": node.state == GcsNodeInfo.ALIVE}
        for node_id, node in nodes.items()
    ]


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
