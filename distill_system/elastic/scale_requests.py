"""The files with which a person asks a run for other pool sizes, and the run's answers.

In the run's folder, under scaling/:

    request-TIME-ID.json    one request, written by `distill-system scale`, removed by the run
    status.json             the run's answers and the state of its pools
    alive                   locked by the run while it reads requests. The operating system frees
                            the lock when the process ends, however it ends, so that a killed run
                            is never taken for one that reads.
"""

from __future__ import annotations

import fcntl
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from distill_system.errors import RunStateError
from distill_system.observe import RunDirectory
from distill_system.observe.run_directory import (
    read_form,
    read_form_if_exists,
    told_as_unwritable,
    write_json,
)
from distill_system.observe.run_lock import try_to_lock
from distill_system.writer_thread import WriterThread


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRequest:
    """wanted: pool -> number of workers.  problem: why the file cannot be read, or ""."""

    request_id: str
    wanted: dict[str, int] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """Numbers of workers of a pool: wanted, present, starting and leaving.

    since: seconds since the epoch at which the pending change was asked for; None if there is none.
    problem: why the last change was not made, or "".
    no_place: what the cluster has, where a worker of the pending change finds no place in it, else
        "".
    """

    wanted: int
    present: int
    starting: int = 0
    leaving: int = 0
    since: float | None = None
    problem: str = ""
    no_place: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether the pool has the wanted size and no worker is starting or leaving."""
        return self.wanted == self.present and not self.starting and not self.leaving


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleStatus:
    """The content of status.json.

    answers: id of each recent request -> why it was refused, or "" if it was accepted.
    """

    pools: Mapping[str, PoolStatus]
    answers: Mapping[str, str]


class _Request(TypedDict):
    wanted: dict[str, int]


_REQUEST_FORM = TypeAdapter(_Request)
_STATUS_FORM = TypeAdapter(ScaleStatus)


class ScaleRequests:
    """The requests to one run and its answers; used by the run and by `distill-system scale`."""

    def __init__(self, run: RunDirectory) -> None:
        self.folder = run.path / "scaling"
        self._read: set[Path] = set()
        self._thread = WriterThread("scale requests")
        self._lock = threading.Lock()
        self._found: list[ScaleRequest] = []
        self._unwritten: dict[str, Any] | None = None

    @property
    def status_path(self) -> Path:
        """The file of the run's answers."""
        return self.folder / "status.json"

    def write(self, wanted: Mapping[str, int]) -> str:
        """Write a request for these numbers of workers; returns its id."""
        request_id = uuid.uuid4().hex
        # The time comes first in the name, so that requests are read in the order of writing.
        path = self.folder / f"request-{time.time_ns():020d}-{request_id}.json"
        write_json(path, {"wanted": dict(wanted)})
        return request_id

    def read_new(self) -> list[ScaleRequest]:
        """Requests written since the last call, oldest first; each is returned once and removed.

        Where the disk hangs it is not waited for: they are returned later.
        """
        self._exchange()
        with self._lock:
            found, self._found = self._found, []
        return found

    def write_status(self, status: ScaleStatus) -> None:
        """Write status.json; left out where the disk does not take it."""
        pools = {name: asdict(pool) for name, pool in status.pools.items()}
        with self._lock:
            self._unwritten = {"pools": pools, "answers": dict(status.answers)}
        self._exchange()

    def _exchange(self) -> None:
        self._thread.offer(self._read_and_write, key="exchange")

    def _read_and_write(self) -> None:
        found = []
        for path in sorted(self.folder.glob("request-*.json")):
            if path.is_file() and path not in self._read:
                found.append(_read_request(path))
                self._read.add(path)
                with suppress(OSError):  # a disk that has become read-only
                    path.unlink()
        with self._lock:
            self._found += found
            status, self._unwritten = self._unwritten, None
        if status is not None:
            with suppress(OSError):  # no run ends for a figure that somebody might look at
                write_json(self.status_path, status)

    def read_status(self) -> ScaleStatus | None:
        """What status.json holds; None if the run has not written it yet.

        Raises: RunStateError if the file is not as write_status writes it.
        """
        way_out = "Remove the file: the run writes another"
        return read_form_if_exists(self.status_path, _STATUS_FORM, way_out=way_out)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hold the lock that shows, for the length of a block, that a run reads requests here.

        Raises: RunStateError if another process holds it.
        """
        with told_as_unwritable(self._lock_path):
            self.folder.mkdir(parents=True, exist_ok=True)
            opened = self._lock_path.open("a", encoding="utf-8")
        with opened as file:
            if try_to_lock(file.fileno(), fcntl.LOCK_EX) is False:
                raise RunStateError(
                    f"{self.folder.parent}: another process trains this run; wait until it ends"
                )
            # Requests and answers of an earlier run: its `scale` commands have ended with an error.
            self.read_new()
            self.status_path.unlink(missing_ok=True)
            yield

    def has_listener(self) -> bool:
        """Whether a run reads requests now; assumed on a file system without locks."""
        if not self._lock_path.exists():
            return False
        with self._lock_path.open("r", encoding="utf-8") as file:
            # A shared lock: with exclusive ones, two commands would take each other for the run.
            return try_to_lock(file.fileno(), fcntl.LOCK_SH) is not True

    @property
    def _lock_path(self) -> Path:
        return self.folder / "alive"


def _read_request(path: Path) -> ScaleRequest:
    request_id = path.stem.rpartition("-")[-1]
    try:
        form = read_form(path, _REQUEST_FORM, way_out='Expected {"wanted": {pool: count}}')
    except RunStateError as error:
        return ScaleRequest(request_id=request_id, problem=str(error))
    return ScaleRequest(request_id=request_id, wanted=form["wanted"])
