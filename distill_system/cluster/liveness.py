"""The workers of a session by name, and whether all of them still live."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from distill_system.errors import WorkerError
from distill_system.workers import Reference

_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_FIELDS = re.compile(r"^\t(\w+): (.*)$", re.MULTILINE)
_WORKER_IDS = re.compile(r"actor_id[=:] ?([0-9a-f]{32})")


class LivenessMonitor:
    """Names of workers by what Ray calls them; threads may share it.

    A worker can die while something else is waited for, and what is waited for may then never
    come: whoever waits asks now and then whether all are alive.
    """

    def __init__(self, handles: Mapping[str, Any] | None = None) -> None:
        self._lock = threading.Lock()
        self._handles: dict[str, Any] = {}
        self._names: dict[str, str] = {}  # by Ray's id; kept of workers that are gone
        self._answers: dict[str, Reference] = {}
        self._looked_at = time.monotonic()
        self.add(handles or {})

    def add(self, handles: Mapping[str, Any]) -> None:
        """Watch over these workers too."""
        with self._lock:
            self._handles |= handles
            self._names |= {handle._actor_id.hex(): name for name, handle in handles.items()}

    def remove(self, names: Iterable[str]) -> None:
        """Watch over these no more: they are about to be ended."""
        with self._lock:
            for name in names:
                self._handles.pop(name, None)
                self._answers.pop(name, None)

    def worker_of(self, reference: Reference) -> str:
        """Name of the worker whose call gives this result."""
        return self._name(reference.task_id().actor_id().hex()) or "a worker"

    def origin_of(self, error: RayError) -> str | None:
        """Name of the worker where an error arose: not the one whose call was handed it."""
        inner = getattr(error, "cause", None)
        for known in (inner, error):
            if isinstance(known, RayActorError) and known.actor_id:
                return self._name(known.actor_id)
        ids = _WORKER_IDS.findall(str(error))  # the innermost traceback comes last
        return self._name(ids[-1]) if ids else None

    def require_alive(self, *, seconds: float, waiting_for: str) -> None:
        """Give all workers this long to show that they live; a busy one need not answer.

        Raises: WorkerError if one is dead.
        """
        self._hear(seconds=0.0, waiting_for=waiting_for)  # an old answer says nothing of now
        self._ask()
        self._hear(seconds=seconds, waiting_for=waiting_for)

    def look_around(self, *, every: float, waiting_for: str) -> None:
        """Look whether all workers live, if that was not looked at for so many seconds.

        Raises: WorkerError if one is dead.
        """
        now = time.monotonic()
        if now - self._looked_at >= every:
            self._looked_at = now
            self.require_alive(seconds=0.0, waiting_for=waiting_for)

    def _hear(self, *, seconds: float, waiting_for: str) -> None:
        """Take in the answers that come within this long."""
        with self._lock:
            asked = dict(self._answers)
        if not asked:
            return
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
        for name in [name for name, answer in asked.items() if answer in answered]:
            try:
                ray.get(asked[name])
            except ActorDiedError as error:
                if self._is_watched(name):  # and not ended on purpose meanwhile
                    raise death_of(name, error, waiting_for=waiting_for) from error
            with self._lock:
                self._answers.pop(name, None)

    def _ask(self) -> None:
        """Ask every worker for an answer; one that owes one is not asked again."""
        with self._lock:
            for name, handle in self._handles.items():
                if name not in self._answers:
                    self._answers[name] = handle.__ray_ready__.remote()

    def _is_watched(self, name: str) -> bool:
        with self._lock:
            return name in self._handles

    def _name(self, worker_id: str) -> str | None:
        with self._lock:
            return self._names.get(worker_id)


def death_of(name: str, error: RayError, *, waiting_for: str) -> WorkerError:
    """What to tell of a worker whose process is gone."""
    text = plain_text(error)
    said = dict(_FIELDS.findall(text))
    cause = text.splitlines()[-1].partition(" Some common causes include")[0]
    return WorkerError(
        f"{name} (process {said.get('pid', '?')} on {said.get('ip', '?')}) died while the run "
        f"waited for {waiting_for}: {cause} Look whether its machine ran out of memory, and what "
        "its log in the logs folder of the Ray session says last; --resume continues from the "
        "newest checkpoint"
    )


def plain_text(error: RayError) -> str:
    """Ray's message, without colours and the lines that only underline other lines."""
    text = _TERMINAL_COLOURS.sub("", str(error)).strip()
    return "\n".join(line for line in text.splitlines() if set(line.strip()) - set("^~"))
