"""A run's folder, kept on an object store too: sent while the run goes on, fetched to go on.

The run itself lives in a folder, as without a mirror: an object store knows no append, no rename
and no lock. What a file's writer has completed is copied; of a checkpoint the manifest goes last,
so that one in the mirror is whole if it has a manifest, whenever the copying was cut off.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import ArrowException, fs

from distill_system.config import RunConfig
from distill_system.errors import ConfigError, RunStateError
from distill_system.observe import RunDirectory
from distill_system.run.checkpoints import MANIFEST_FILE

SEND_SECONDS = 60.0
"""Between two looks for what is new."""

_COPY_BYTES = 2**24

_CHECKPOINT = "step_"

Seen = dict[str, tuple[int, int]]
"""File, relative to the run's folder -> size and time of its last change in ns."""


@contextmanager
def mirrored(
    config: RunConfig, run: RunDirectory, *, notify: Callable[[str], None]
) -> Iterator[None]:
    """For the length of a block keep the run's folder in runs_mirror too, if there is one.

    A run that is not in its folder and is in the mirror is fetched first. At the end of the block,
    however it ends, what is new is sent once more. A failure to send is told and tried again: it
    does not end the run.

    Raises: ConfigError if the mirror cannot be written; RunStateError if it cannot be fetched.
    """
    if config.runs_mirror is None:
        yield
        return
    mirror = RunMirror(config.runs_mirror, run, notify=notify)
    mirror.require_writable()
    if not run.config_path.exists():
        mirror.fetch()
    ended = threading.Event()
    sender = threading.Thread(target=mirror.send_until, args=(ended,), daemon=True)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        sender.join(config.deadlines.call_seconds)
        if sender.is_alive():
            seconds = config.deadlines.call_seconds
            notify(
                f"{config.runs_mirror}: the end of the run was not sent within {seconds:.0f} s "
                f"(deadlines.call_seconds): it is in {run.path}"
            )


class RunMirror:
    """One run's folder below the address of a mirror, such as s3://bucket/runs."""

    def __init__(self, address: str, run: RunDirectory, *, notify: Callable[[str], None]) -> None:
        self.address = f"{address.rstrip('/')}"
        self._run = run
        self._notify = notify
        self._sent: Seen = {}
        try:
            self._store, folder = fs.FileSystem.from_uri(address)
        except (ArrowException, OSError, ValueError) as error:
            raise ConfigError(
                f"runs_mirror={address!r}: expected s3://BUCKET/FOLDER or gs://BUCKET/FOLDER: "
                f"{error}"
            ) from error
        self._folder = str(PurePosixPath(folder) / run.path.name)

    def require_writable(self) -> None:
        """Write a file there and remove it.  Raises: ConfigError."""
        probe = f"{self._folder}/.probe"
        try:
            self._store.create_dir(self._folder, recursive=True)
            with self._store.open_output_stream(probe) as stream:
                stream.write(b"may this run write here?")
            self._store.delete_file(probe)
        except (ArrowException, OSError) as error:
            raise ConfigError(
                f"runs_mirror={self.address}: it cannot be written: {error}. Check the address and "
                "the credentials in this process's environment (AWS_ACCESS_KEY_ID and so on)"
            ) from error

    def send_until(self, ended: threading.Event) -> None:
        """Send what is new every SEND_SECONDS until the event is set, and once more then."""
        while not ended.wait(SEND_SECONDS):
            self.send()
        self.send()

    def send(self) -> None:
        """Copy every complete file that is new or has changed, and remove what is gone."""
        try:
            self._send(_files(self._run.path))
        except (ArrowException, OSError) as error:
            self._notify(f"{self.address}: not all of the run could be sent ({error}); tried again")

    def fetch(self) -> None:
        """Copy the run from the mirror into its folder; does nothing if there is none.

        Raises: RunStateError.
        """
        try:
            there = self._files_there()
            if "config.json" not in there:
                return
            self._notify(f"fetching the run from {self.address}")
            # The configuration goes last: with it the folder holds a run, and is not fetched again.
            for name in sorted(_whole(there), key=lambda name: name == "config.json"):
                self._fetch_file(name)
        except (ArrowException, OSError) as error:
            raise RunStateError(
                f"{self.address}: the run could not be fetched: {error}. The same command goes on"
            ) from error
        self._sent = _files(self._run.path)

    def _send(self, here: Seen) -> None:
        for name in sorted(here, key=_last_of_its_checkpoint):
            if self._sent.get(name) != here[name] and self._send_file(name):
                self._sent[name] = here[name]
        for name in sorted(self._sent.keys() - here.keys(), key=_last_of_its_checkpoint)[::-1]:
            # The manifest first: what is left of a checkpoint is then none.
            self._store.delete_file(f"{self._folder}/{name}")
            del self._sent[name]

    def _send_file(self, name: str) -> bool:
        try:
            with (self._run.path / name).open("rb") as source:
                self._copy(source, self._store.open_output_stream(self._make_room(name)))
        except FileNotFoundError:
            return False  # an old checkpoint, removed meanwhile
        return True

    def _make_room(self, name: str) -> str:
        """The file's path in the mirror, whose folder exists; an object store has none."""
        path = f"{self._folder}/{name}"
        if self._store.type_name == "local":
            self._store.create_dir(str(PurePosixPath(path).parent), recursive=True)
        return path

    def _fetch_file(self, name: str) -> None:
        path = self._run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._store.open_input_stream(f"{self._folder}/{name}") as source:
            self._copy(source, path.open("wb"))

    @staticmethod
    def _copy(source: Any, target: Any) -> None:
        with target:
            while block := source.read(_COPY_BYTES):
                target.write(block)

    def _files_there(self) -> set[str]:
        selector = fs.FileSelector(self._folder, recursive=True, allow_not_found=True)
        found = self._store.get_file_info(selector)
        files = [info.path for info in found if info.type == fs.FileType.File]
        return {str(PurePosixPath(path).relative_to(self._folder)) for path in files}


def _files(folder: Path) -> Seen:
    """What is complete below a run's folder: nothing half-written, no lock, no request."""
    seen: Seen = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not _is_passing(name.parts):
            status = path.stat()
            seen[str(name)] = (status.st_size, status.st_mtime_ns)
    return seen


def _is_passing(parts: Sequence[str]) -> bool:
    """Whether a file is of this moment only."""
    half = any(part.startswith(".") or part.endswith((".partial", ".removed")) for part in parts)
    return half or "scaling" in parts[:-1] or parts[-1] == "lock"


def _last_of_its_checkpoint(name: str) -> tuple[bool, str]:
    """Order of sending: manifests after everything else."""
    return Path(name).name == MANIFEST_FILE, name


def _whole(names: set[str]) -> set[str]:
    """Without files of checkpoints that have no manifest."""

    def is_whole(name: str) -> bool:
        checkpoint = next((p for p in Path(name).parents if p.name.startswith(_CHECKPOINT)), None)
        return checkpoint is None or str(checkpoint / MANIFEST_FILE) in names

    return {name for name in names if is_whole(name)}
