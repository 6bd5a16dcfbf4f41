"""Waiting for results of calls: with a deadline, and errors that name the worker and the work.

Two things end a wait early: a result that failed, and the death of a worker that nobody replaces,
even one that owes no result here (see LivenessMonitor).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from distill_system.cluster.liveness import LivenessMonitor, death_error, plain_text
from distill_system.errors import DeadlineError, DistillError, WorkerLostError
from distill_system.workers import Reference

LIVENESS_CHECK_SECONDS = 5.0
"""Time between two checks that every worker is alive."""

DEATH_SECONDS = 2.0
"""A worker's death makes its peers fail, often before Ray reports the death. A failure is held back
for this long, so that the death, which is the cause, is reported instead."""

MANY_CALLS = 16
"""With more unhurried calls than this, waking up for each costs more than waiting for several."""

LAST_TRACEBACK_LINES = 30


def wait_for(
    references: Sequence[Reference],
    monitor: LivenessMonitor,
    *,
    what: str,
    seconds: float,
    fetch: bool = True,
    key: str | None = None,
) -> list[Any]:
    """Results of all references in their order; raises the first failure as soon as it is known.

    references: results of calls of the monitor's workers.
    monitor: names the workers; the death of any of them ends the wait.
    what: what is waited for, for messages.
    seconds: the deadline, counted from the last result that came: slow progress is no failure.
    key: of the configuration, which sets the deadline; for messages.
    fetch: whether to copy the results into this process. Without it a failed call counts as
        done, and the failure shows in the call that takes its result as an argument.
    Raises: a DistillError that a worker raised, with the worker's name; WorkerLostError if a worker
        died, or raised anything else, with its traceback; DeadlineError, which names what was
        waited for and the workers that have not answered.
    """
    results: dict[Reference, Any] = {}
    if fetch and (at_once := _fetch_all(references)) is not None:
        return at_once
    pending, last_news = list(references), time.monotonic()
    while pending:
        left = max(0.0, last_news + seconds - time.monotonic())
        done, pending = ray.wait(
            pending, num_returns=1, timeout=min(LIVENESS_CHECK_SECONDS, left), fetch_local=fetch
        )
        now = time.monotonic()
        if done:
            last_news = now
            results |= {ref: _fetch(ref, monitor, what) if fetch else None for ref in done}
        elif now - last_news >= seconds:
            raise deadline_error(references, pending, monitor, what=what, seconds=seconds, key=key)
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
    """The references that are done, as soon as there is one; an empty list after `seconds`.

    A call that failed counts as done. references: calls whose end must be known at once.
    unhurried: calls that may be known late. With more than MANY_CALLS of them, this waits up to
    together_seconds and returns all that ended meanwhile, unless one of `references` ends first:
    one wake-up for many calls is cheaper than one for each.

    Raises: WorkerLostError if a worker died that nobody replaces.
    """
    every = [*references, *unhurried]
    if every:
        if len(unhurried) > MANY_CALLS:
            _gather(list(references), list(unhurried), seconds=min(seconds, together_seconds))
        # With num_returns=1 ray.wait returns one reference even if many are done, so first ask
        # for all that are done now; only if there is none, wait for one.
        done, _ = ray.wait(every, num_returns=len(every), timeout=0, fetch_local=False)
        if not done:
            done, _ = ray.wait(every, num_returns=1, timeout=seconds, fetch_local=False)
        if done:
            return list(done)
    else:
        time.sleep(seconds)
    monitor.check_if_due(every=LIVENESS_CHECK_SECONDS, waiting_for=what)
    return []


def _gather(urgent: list[Reference], others: list[Reference], *, seconds: float) -> None:
    """Wait until an urgent call is done, or all others if none is urgent; at most `seconds`."""
    if urgent:
        ray.wait(urgent, num_returns=1, timeout=seconds, fetch_local=False)
    else:
        ray.wait(others, num_returns=len(others), timeout=seconds, fetch_local=False)


def _fetch_all(references: Sequence[Reference]) -> list[Any] | None:
    """All results if all are done and none has failed, else None.

    One ray.get of many references is much faster than one call for each.
    """
    if not references:
        return []
    try:
        return list(ray.get(list(references), timeout=0))
    except RayError:  # not all done (GetTimeoutError), or a failure: the slow path tells them apart
        return None


def _fetch(reference: Reference, monitor: LivenessMonitor, what: str) -> Any:
    try:
        return ray.get(reference)
    except RayError as error:
        name = monitor.origin_of(error) or monitor.worker_of(reference)
        cause = getattr(error, "cause", error)  # Ray wraps what the worker raised
        if not isinstance(cause, RayActorError):
            monitor.require_alive(seconds=DEATH_SECONDS, waiting_for=what)
        raise _to_distill_error(name, cause, error, what) from error


def _to_distill_error(name: str, cause: BaseException, error: RayError, what: str) -> DistillError:
    if isinstance(cause, DistillError):
        renamed = type(cause)(f"{name}: {cause}")
        renamed.__dict__ |= cause.__dict__
        renamed.worker = cause.worker or name
        return renamed
    # A constructor that raised is reported as a death too; there the traceback says more.
    if isinstance(cause, RayActorError) and not cause.actor_init_failed:
        return death_error(name, cause, waiting_for=what)
    lines = plain_text(error).splitlines()[-LAST_TRACEBACK_LINES:]
    return WorkerLostError("\n".join([f"{name} failed at {what}:", *lines]), name)


def deadline_error(
    references: Sequence[Reference],
    pending: Sequence[Reference],
    monitor: LivenessMonitor,
    *,
    what: str,
    seconds: float,
    key: str | None = None,
) -> DeadlineError:
    """The error for calls of which none has ended in `seconds`; names the workers that are late.

    key: of the configuration, which sets the deadline.
    """
    late = sorted({monitor.worker_of(reference) for reference in pending})
    return DeadlineError(
        f"waited {seconds:.0f} s for {what} from {', '.join(late)}: {len(pending)} of "
        f"{len(references)} results did not come. Raise {key or 'the deadline under `deadlines`'}, "
        "or look at the worker's log in the Ray dashboard",
        late,
    )
