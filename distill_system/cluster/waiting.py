"""Waiting for results of calls: with a deadline, and an error that says who failed at what."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from distill_system.cluster.liveness import LivenessMonitor, death_of, plain_text
from distill_system.errors import DeadlineError, DistillError, WorkerError
from distill_system.workers import Reference

LOOK_SECONDS = 5.0
"""Between two looks at whether every worker still lives."""

DEATH_SECONDS = 2.0
"""A worker's death makes others fail too: so long a failure waits for the news of a death."""

MANY_CALLS = 16
"""With more unhurried calls than this, hearing of each by itself costs more than waiting."""

LAST_TRACEBACK_LINES = 30


def wait_for(
    references: Sequence[Reference],
    monitor: LivenessMonitor,
    *,
    what: str,
    seconds: float,
    fetch: bool = True,
) -> list[Any]:
    """Results of all references in their order; the first failure as soon as it is known.

    Args:
        references: results of calls of the monitor's workers.
        monitor: names the workers; a death of any of them ends the wait.
        what: what is waited for, for messages.
        seconds: longest time without a new result.
        fetch: whether to bring the results here; without it a failed call counts as done, and
            whoever is handed its result fails with its error.

    Raises:
        DistillError: of the type that a worker raised, with the worker's name.
        WorkerError: a worker died, or raised anything else; with its traceback.
        DeadlineError: names what was waited for, and the workers that owe it.
    """
    results: dict[Reference, Any] = {}
    if fetch and (at_once := _fetch_all(references)) is not None:
        return at_once
    pending, last_news = list(references), time.monotonic()
    while pending:
        left = max(0.0, last_news + seconds - time.monotonic())
        done, pending = ray.wait(
            pending, num_returns=1, timeout=min(LOOK_SECONDS, left), fetch_local=fetch
        )
        now = time.monotonic()
        if done:
            last_news = now
            results |= {ref: _fetch(ref, monitor, what) if fetch else None for ref in done}
        elif now - last_news >= seconds:
            raise deadline_error(references, pending, monitor, what=what, seconds=seconds)
        else:
            monitor.require_alive(seconds=0.0, waiting_for=what)
    return [results[reference] for reference in references] if fetch else []


def wait_any(
    references: Sequence[Reference],
    monitor: LivenessMonitor,
    *,
    what: str,
    seconds: float,
    unhurried: Sequence[Reference] = (),
    together_seconds: float = 0.0,
) -> list[Reference]:
    """Those that are done, failed ones among them, as soon as there is one; none after so long.

    unhurried: waited for too; where they are many, those that end within together_seconds are heard
    of together, unless one of the others ends before: it costs less.

    Raises: WorkerError if a worker of the monitor died.
    """
    every = [*references, *unhurried]
    if every:
        if len(unhurried) > MANY_CALLS:
            _listen(list(references), list(unhurried), seconds=min(seconds, together_seconds))
        done, _ = ray.wait(every, num_returns=len(every), timeout=0, fetch_local=False)
        if not done:
            done, _ = ray.wait(every, num_returns=1, timeout=seconds, fetch_local=False)
        if done:
            return list(done)
    else:
        time.sleep(seconds)
    monitor.look_around(every=LOOK_SECONDS, waiting_for=what)
    return []


def _listen(urgent: list[Reference], others: list[Reference], *, seconds: float) -> None:
    """Return once an urgent one or all others are done, or after so long."""
    if urgent:
        ray.wait(urgent, num_returns=1, timeout=seconds, fetch_local=False)
    else:
        ray.wait(others, num_returns=len(others), timeout=seconds, fetch_local=False)


def _fetch_all(references: Sequence[Reference]) -> list[Any] | None:
    """All results together where all are there and none has failed; one by one is slower."""
    if not references:
        return []
    try:
        return list(ray.get(list(references), timeout=0))
    except RayError:  # a GetTimeoutError among them
        return None  # told by whoever looks at them one by one


def _fetch(reference: Reference, monitor: LivenessMonitor, what: str) -> Any:
    try:
        return ray.get(reference)
    except RayError as error:
        who = monitor.origin_of(error) or monitor.worker_of(reference)
        cause = getattr(error, "cause", error)
        if not isinstance(cause, RayActorError):
            monitor.require_alive(seconds=DEATH_SECONDS, waiting_for=what)
        raise _told(who, cause, error, what) from error


def _told(who: str, cause: BaseException, error: RayError, what: str) -> DistillError:
    if isinstance(cause, DistillError):
        return type(cause)(f"{who}: {cause}")
    if isinstance(cause, RayActorError) and not cause.actor_init_failed:
        return death_of(who, cause, waiting_for=what)
    lines = plain_text(error).splitlines()[-LAST_TRACEBACK_LINES:]
    return WorkerError("\n".join([f"{who} failed at {what}:", *lines]))


def deadline_error(
    references: Sequence[Reference],
    pending: Sequence[Reference],
    monitor: LivenessMonitor,
    *,
    what: str,
    seconds: float,
) -> DeadlineError:
    """What to raise where nothing has ended for so long; names the workers that owe results."""
    owing = ", ".join(sorted({monitor.worker_of(reference) for reference in pending}))
    return DeadlineError(
        f"waited {seconds:.0f} s for {what} from {owing}: {len(pending)} of {len(references)} "
        "results did not come. Raise the deadline under `deadlines`, or look at the worker's "
        "log in the Ray dashboard"
    )
