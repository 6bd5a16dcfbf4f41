"""The lock of a run's folder: who writes there holds it first, so that no two commands do at once.

    lock                    in the folder while a command writes there: who holds it, as JSON
    flock on that file      held by the same command; the operating system frees it when the process
                            ends, however it ends

Where the system's locks may not reach (another machine that shares the folder), the holder gives
signs of life as well: it touches the file every BEAT_SECONDS.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from distill_system.errors import RunStateError
from distill_system.observe.run_directory import RunDirectory
from distill_system.writer_thread import WriterThread, is_done

BEAT_SECONDS = 10.0
WATCH_SECONDS = 60.0
"""How long a holder on another machine may be silent before it counts as dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock.

    boot: id of the start of the kernel, whose locks bind all processes of the machine.
    processes: id of the table of processes that `process` is a number of; a container has its own.
    started: start of the process, in clock ticks since the boot; a later one may have its number.
    since: when the lock was taken, seconds since the epoch.
    """

    host: str
    boot: str
    processes: str
    process: int
    started: int
    since: float

    @property
    def is_here(self) -> bool:
        """Whether its number is one of this process's own table of processes."""
        ours = _this_process()
        return (self.boot, self.processes) == (ours.boot, ours.processes)

    def describe(self) -> str:
        """Process, host, and since when it holds the lock."""
        since = datetime.fromtimestamp(self.since).strftime("%Y-%m-%d %H:%M:%S")
        return (
            f"process {self.process} on {self.host}, since {since} "
            f"({_say_age(time.time() - self.since)})"
        )


@contextmanager
def locked(
    run: RunDirectory,
    *,
    notify: Callable[[str], None] = print,
    watch_seconds: float = WATCH_SECONDS,
) -> Iterator[None]:
    """Hold the lock of a run's folder for the length of a block; makes the folder.

    The lock of a holder that has died is taken over. At the end, folders that were made for the
    lock alone are removed again.

    watch_seconds: how long to look for signs of life of a holder on another machine.
    Raises: RunStateError if another process holds it, or the folder cannot be written. Nothing in
        the folder has changed then.
    """
    absent = [path for path in (run.path, *run.path.parents) if not path.exists()]
    ended = threading.Event()
    try:
        file = _take(run.lock_path, notify, watch_seconds)
    except OSError as error:
        if absent:
            _remove([run.lock_path], absent)
        raise RunStateError(
            f"the run's folder {run.path} cannot be written: {error}. Mend that, or give another "
            "runs_directory"
        ) from error
    threading.Thread(target=_beat, args=(run.lock_path, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        # Before it is closed: from then on it may be another's. Left behind where the disk hangs.
        removed = WriterThread("lock").submit(lambda: _remove([run.lock_path], absent))
        if is_done(removed, BEAT_SECONDS):
            file.close()


def find_holder(run: RunDirectory) -> Holder | None:
    """Who holds the lock of a run's folder now; None if nobody is known to.

    Asks in a moment: a holder on another machine counts as alive while its last sign of life is
    younger than WATCH_SECONDS.
    """
    path, holder = run.lock_path, _read_holder(run.lock_path)
    if holder is None:
        return None
    if holder.is_here:
        lives = _start_of(holder.process) == holder.started
    else:
        lives = time.time() - path.stat().st_mtime < WATCH_SECONDS
    return holder if lives else None


def try_to_lock(descriptor: int, kind: int) -> bool | None:
    """Whether the lock was free and is now held, until the file is closed; None without locks.

    kind: fcntl.LOCK_EX or fcntl.LOCK_SH.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return None
        raise
    return True


def _take(path: Path, notify: Callable[[str], None], watch_seconds: float) -> BinaryIO:
    """The lock's open file, which says that this process holds it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            binds = try_to_lock(file.fileno(), fcntl.LOCK_EX)
            if binds is False:
                raise _in_use(path)
            if not _is_at(path, file):
                file.close()  # its holder has just removed it, and ended
                continue
            _require_no_other(path, binds is True, notify, watch_seconds)
            record = json.dumps(asdict(_this_process())).encode() + b"\n"
            file.write(record)
            file.truncate(len(record))
        except BaseException:
            file.close()
            raise
        return file


def _require_no_other(
    path: Path, binds: bool, notify: Callable[[str], None], watch_seconds: float
) -> None:
    """Check that who is named in the lock's file is dead.

    binds: whether the system has just given us the lock. It binds every process of this kernel, and
    may or may not bind other machines.
    Raises: RunStateError if the holder lives.
    """
    holder, ours = _read_holder(path), _this_process()
    if holder is None or (binds and holder.boot == ours.boot):
        return
    if (holder.boot, holder.processes) == (ours.boot, ours.processes):
        lives = _start_of(holder.process) == holder.started
    else:
        notify(
            f"{path}: held by {holder.describe()}; it is looked for signs of life, "
            f"{watch_seconds:.0f} s at most"
        )
        lives = _is_touched(path, watch_seconds)
    if lives:
        raise _in_use(path)
    notify(f"{path}: its holder has died ({holder.describe()}); the lock is taken over")


def _in_use(path: Path) -> RunStateError:
    holder = _read_holder(path)
    who = "another process" if holder is None else holder.describe()
    return RunStateError(
        f"{path.parent} is in use: {who} writes there and holds {path}. Nothing was changed. Wait "
        "until it ends, or end it, then give the same command again; another name (name=...) can "
        "run beside it. Remove that file only if its host is gone for good"
    )


def _is_touched(path: Path, seconds: float) -> bool:
    """Whether somebody touches the file within so many seconds.

    Opened anew for each look: a file system of the network asks its server again then.
    """
    deadline, first = time.monotonic() + seconds, None
    while True:
        with path.open("rb") as file:
            touched = os.fstat(file.fileno()).st_mtime_ns
        first = touched if first is None else first
        if touched != first:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(1.0, seconds / 10))


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):  # a sign that is missed is followed by the next
            os.utime(path)


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether an open file still stands under this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _read_holder(path: Path) -> Holder | None:
    """Who is named in the file; None if that cannot be told."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _this_process() -> Holder:
    return Holder(
        host=socket.gethostname(),
        boot=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        processes=os.readlink("/proc/self/ns/pid"),
        process=os.getpid(),
        started=_start_of(os.getpid()) or 0,
        since=time.time(),
    )


def _start_of(process: int) -> int | None:
    """When a process of this machine started, in clock ticks since the boot; None if it is gone."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Its name, the second field, stands in brackets and may hold both spaces and brackets.
    state, *fields = status.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])  # a zombie has ended


def _say_age(seconds: float) -> str:
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _remove(files: Sequence[Path], folders: Sequence[Path]) -> None:
    """Remove files, then folders that are empty now, the innermost first."""
    with suppress(OSError):  # a file that stays is held by nobody: it is taken over
        for file in files:
            file.unlink(missing_ok=True)
        for folder in folders:
            folder.rmdir()
