"""The files by which a person asks a run for other pool sizes, and by which the run answers.

In the run's folder, under scaling/: a request is a file of its own, which the run removes as it
reads it; status.json is the run's answer; the run holds a lock on `alive` as long as it listens,
which its machine's system gives free when the process ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill_system.errors import RunStateError
from distill_system.observe import RunDirectory
from distill_system.observe.run_directory import read_json, write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRequest:
    """Pool -> number of workers that are asked for; problem: why the file cannot be read, or ""."""

    request_id: str
    wanted: dict[str, int] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """How far a pool is from what is asked of it; workers.

    since: seconds since the epoch at which it was last as it should be, None if it is so now.
    problem: why the last change was not made, or "".
    """

    wanted: int
    present: int
    starting: int = 0
    leaving: int = 0
    since: float | None = None
    problem: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether no worker comes or goes."""
        return self.wanted == self.present and not self.starting and not self.leaving


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleStatus:
    """What the run answers: its pools, and to each of the last requests "" or why it is refused."""

    pools: Mapping[str, PoolStatus]
    answers: Mapping[str, str]


class ScaleRequests:
    """The requests of one run and their answers, for both sides."""

    def __init__(self, run: RunDirectory) -> None:
        self.folder = run.path / "scaling"

    @property
    def status_path(self) -> Path:
        """The run's answer."""
        return self.folder / "status.json"

    def write(self, wanted: Mapping[str, int]) -> str:
        """Ask for these numbers of workers; the request's id."""
        request_id = uuid.uuid4().hex
        # Named by the time, so that they are read in the order in which they were written.
        path = self.folder / f"request-{time.time_ns():020d}-{request_id}.json"
        write_json(path, {"wanted": dict(wanted)})
        return request_id

    def read_new(self) -> list[ScaleRequest]:
        """The requests that were written since this was last asked, oldest first; each once."""
        found = []
        for path in sorted(self.folder.glob("request-*.json")):
            found.append(_read_request(path))
            path.unlink()
        return found

    def write_status(self, status: ScaleStatus) -> None:
        """Answer."""
        pools = {name: asdict(pool) for name, pool in status.pools.items()}
        write_json(self.status_path, {"pools": pools, "answers": dict(status.answers)})

    def read_status(self) -> ScaleStatus | None:
        """The run's last answer; None before its first.

        Raises: RunStateError if the file holds something else.
        """
        if not self.status_path.exists():
            return None
        form: Any = read_json(self.status_path)
        try:
            pools = {name: PoolStatus(**pool) for name, pool in form["pools"].items()}
            return ScaleStatus(pools=pools, answers=dict(form["answers"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise RunStateError(
                f"{self.status_path}: expected pools and answers as the run writes them "
                f"({error!r}); remove the file, the run writes another"
            ) from error

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let others see, for the length of a block, that a run reads requests here.

        Requests that an earlier run has left are removed: who wrote them was told that it ended.
        Raises: RunStateError if another process listens.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock_path.open("a", encoding="utf-8") as file:
            if _try_to_lock(file.fileno(), fcntl.LOCK_EX) is False:
                raise RunStateError(
                    f"{self.folder.parent}: another process trains this run; wait until it ends"
                )
            self.read_new()
            self.status_path.unlink(missing_ok=True)
            yield

    def is_heard(self) -> bool:
        """Whether a run listens now; taken to do so on a file system that knows no locks."""
        if not self._lock_path.exists():
            return False
        with self._lock_path.open("r", encoding="utf-8") as file:
            # Shared, so that two who ask do not take each other for the run.
            return _try_to_lock(file.fileno(), fcntl.LOCK_SH) is not True

    @property
    def _lock_path(self) -> Path:
        return self.folder / "alive"


def _try_to_lock(descriptor: int, kind: int) -> bool | None:
    """Whether the lock was free, None where there are no locks; it goes back with the file."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return None
        raise
    return True


def _read_request(path: Path) -> ScaleRequest:
    request_id = path.stem.rpartition("-")[-1]
    text = path.read_text(encoding="utf-8")
    try:
        wanted = json.loads(text)["wanted"]
        good = all(isinstance(n, str) and type(count) is int for n, count in wanted.items())
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        problem = f'{path.name}: expected {{"wanted": {{pool: count}}}}, got {text[:80]!r}'
        return ScaleRequest(request_id=request_id, problem=problem)
    return ScaleRequest(request_id=request_id, wanted=wanted)
