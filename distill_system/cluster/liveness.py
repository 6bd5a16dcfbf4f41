"""Which workers a session has, by name, and whether all their processes are alive."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from distill_system.errors import WorkerLostError
from distill_system.workers import Reference

_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_FIELDS = re.compile(r"^\t(\w+): (.*)$", re.MULTILINE)
_WORKER_IDS = re.compile(r"actor_id[=:] ?([0-9a-f]{32})")


class LivenessMonitor:
    """Finds dead workers, and turns Ray's worker ids into our names; safe to share among threads.

    A result may depend on a worker other than the one that computes it (a learner rank waits for
    its peers, a broadcast for its receivers), so a wait would hang when that other worker dies.
    Every wait therefore asks this monitor from time to time whether all workers are alive.

    A pool that is supervised replaces its dead: their deaths end no wait for others, `pop_lost`
    tells of them.
    """

    def __init__(self, handles: Mapping[str, Any] | None = None) -> None:
        self._lock = threading.Lock()
        self._handles: dict[str, Any] = {}
        # Keyed by Ray's id. Names stay after a worker is removed: a late error may still name it.
        self._names: dict[str, str] = {}
        # Liveness probes that have not been answered: at most one per worker.
        self._probes: dict[str, Reference] = {}
        self._checked_at = time.monotonic()
        self._supervised: frozenset[str] = frozenset()
        self._lost: dict[str, WorkerLostError] = {}
        self.add(handles or {})

    def supervise(self, pools: Iterable[str]) -> None:
        """From now on deaths in these pools end no wait; `pop_lost` tells of them."""
        self._supervised = frozenset(pools)

    def pop_lost(self) -> list[WorkerLostError]:
        """Deaths in supervised pools that were found since this was last asked."""
        with self._lock:
            lost, self._lost = self._lost, {}
        return list(lost.values())

    def add(self, handles: Mapping[str, Any]) -> None:
        """Monitor these workers too."""
        with self._lock:
            self._handles |= handles
            self._names |= {handle._actor_id.hex(): name for name, handle in handles.items()}

    def remove(self, names: Iterable[str]) -> None:
        """Stop monitoring these workers; call it before ending them on purpose."""
        with self._lock:
            for name in names:
                self._handles.pop(name, None)
                self._probes.pop(name, None)
                self._lost.pop(name, None)

    def worker_of(self, reference: Reference) -> str:
        """Name of the worker that computes this result."""
        return self._name(reference.task_id().actor_id().hex()) or "a worker"

    def origin_of(self, error: RayError) -> str | None:
        """Name of the worker in which an error arose; None if Ray's error does not say.

        Where a failed result is an argument of another call, that call fails too, with the first
        error nested in its own. The worker wanted is the one of the innermost error.
        """
        inner = getattr(error, "cause", None)
        for known in (inner, error):
            if isinstance(known, RayActorError) and known.actor_id:
                return self._name(known.actor_id)
        # Other errors carry no id as a field. Ray prints nested tracebacks outermost first.
        ids = _WORKER_IDS.findall(str(error))
        return self._name(ids[-1]) if ids else None

    def require_alive(self, *, seconds: float, waiting_for: str) -> None:
        """Probe every worker and wait this long for answers.

        A probe queues behind a worker's current call, so silence means busy, not dead. A dead
        worker's probe fails at once.

        Raises: WorkerError if a worker is dead.
        """
        # Probes answered before this call say nothing about now: take them in, then probe anew.
        self._collect_probes(seconds=0.0, waiting_for=waiting_for)
        self._send_probes()
        self._collect_probes(seconds=seconds, waiting_for=waiting_for)

    def find_unresponsive(
        self, names: Iterable[str], *, seconds: float, waiting_for: str
    ) -> list[WorkerLostError]:
        """Of these workers, those that are dead, and those that say nothing for so long.

        For workers that have nothing to do, or nothing that may last as long.
        """
        with self._lock:
            asked = {
                n: self._handles[n].__ray_ready__.remote() for n in names if n in self._handles
            }
        if not asked:
            return []
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
        found = []
        for name, probe in asked.items():
            if probe not in answered:
                said = f"{name} said nothing for {seconds:g} s while the run waited for"
                found.append(WorkerLostError(f"{said} {waiting_for}", name))
                continue
            try:
                ray.get(probe)
            except RayActorError as error:
                found.append(death_error(name, error, waiting_for=waiting_for))
        return found

    def check_if_due(self, *, every: float, waiting_for: str) -> None:
        """Probe all workers if the last such check is at least `every` seconds ago.

        Raises: WorkerLostError if a worker is dead whose pool is not supervised.
        """
        now = time.monotonic()
        if now - self._checked_at >= every:
            self._checked_at = now
            self.require_alive(seconds=0.0, waiting_for=waiting_for)

    def _collect_probes(self, *, seconds: float, waiting_for: str) -> None:
        """Take in the probes that are answered within this long."""
        with self._lock:
            sent = dict(self._probes)
        if not sent:
            return
        answered, _ = ray.wait(list(sent.values()), num_returns=len(sent), timeout=seconds)
        for name in [name for name, probe in sent.items() if probe in answered]:
            try:
                ray.get(sent[name])
            except ActorDiedError as error:
                # A worker that was removed in the meantime has been ended on purpose.
                if self._is_monitored(name):
                    self._hear_of_death(death_error(name, error, waiting_for=waiting_for), error)
            except RayActorError:
                pass  # out of reach for now: its node may come back, or be given up by Ray
            with self._lock:
                self._probes.pop(name, None)

    def _hear_of_death(self, lost: WorkerLostError, cause: RayError) -> None:
        if lost.pool not in self._supervised:
            raise lost from cause
        with self._lock:
            self._lost.setdefault(lost.worker, lost)

    def _send_probes(self) -> None:
        """Probe every worker; one that has not answered its last probe gets no second one."""
        with self._lock:
            for name, handle in self._handles.items():
                if name not in self._probes and name not in self._lost:
                    self._probes[name] = handle.__ray_ready__.remote()

    def _is_monitored(self, name: str) -> bool:
        with self._lock:
            return name in self._handles

    def _name(self, worker_id: str) -> str | None:
        with self._lock:
            return self._names.get(worker_id)


def death_error(name: str, error: RayError, *, waiting_for: str) -> WorkerLostError:
    """The error for a worker whose process is gone, or that no message reaches any more: which
    process, where, and Ray's reason."""
    text = plain_text(error)
    # Ray's message is a list of "name: value" lines, then one line with the cause.
    fields = dict(_FIELDS.findall(text))
    cause = text.splitlines()[-1].partition(" Some common causes include")[0]
    place = _describe_place(fields.get("pid"), fields.get("ip"))
    happened = "died" if isinstance(error, ActorDiedError) else "could not be reached"
    brief = f"{name}{place} {happened} while the run waited for {waiting_for}"
    return WorkerLostError(
        f"{brief}: {cause} Look whether its machine ran out of memory, and what its log in the "
        "logs folder of the Ray session says last; --resume continues from the newest checkpoint",
        name,
        brief,
    )


def _describe_place(pid: str | None, address: str | None) -> str:
    """Of a process in brackets; of a worker on a lost node Ray knows less."""
    if pid is not None:
        return f" (process {pid} on {address or 'an unknown node'})"
    return f" (on {address})" if address else ""


def plain_text(error: RayError) -> str:
    """Ray's message without terminal colours and without lines of ^ and ~ under source code."""
    text = _TERMINAL_COLOURS.sub("", str(error)).strip()
    return "\n".join(line for line in text.splitlines() if set(line.strip()) - set("^~"))
