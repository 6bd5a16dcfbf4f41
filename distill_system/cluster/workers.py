"""A group of Ray-made workers: calls begin here, and every wait has a deadline and a name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from distill_system.errors import DeadlineError, DistillError, WorkerError
from distill_system.workers import Reference

LAST_TRACEBACK_LINES = 30


class RayWorkers:
    """Workers of one class, each in its own process; implements distill_system.workers.Workers."""

    def __init__(
        self,
        name: str,
        handles: Sequence[Any],
        placement_groups: Sequence[PlacementGroup],
        *,
        call_seconds: float,
    ) -> None:
        self.name = name
        self.handles = list(handles)
        self.call_seconds = call_seconds
        self._placement_groups = list(placement_groups)

    @property
    def count(self) -> int:
        """Number of workers."""
        return len(self.handles)

    def start(self, worker: int, method: str, *arguments: Any) -> Reference:
        """Begin one call; arguments that are references are resolved where the call runs."""
        return getattr(self.handles[worker], method).remote(*arguments)

    def finish(
        self,
        references: Sequence[Reference],
        *,
        what: str,
        fetch: bool = True,
        seconds: float | None = None,
    ) -> list[Any]:
        """Wait for results of this group's calls.

        Raises: the worker's own DistillError; WorkerError with its traceback; DeadlineError.
        """
        return wait_for(
            references,
            who=self.name,
            what=what,
            seconds=self.call_seconds if seconds is None else seconds,
            fetch=fetch,
        )

    def stop(self) -> None:
        """End every process of the group and give its resources back."""
        for handle in self.handles:
            ray.kill(handle)
        for group in self._placement_groups:
            remove_placement_group(group)
        self.handles, self._placement_groups = [], []


def wait_for(
    references: Sequence[Reference], *, who: str, what: str, seconds: float, fetch: bool = True
) -> list[Any]:
    """Results of all references, or the first failure, as soon as it is known.

    Raises: the worker's own DistillError; WorkerError with its traceback; DeadlineError.
    """
    pending, failed = list(references), None
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=seconds, fetch_local=fetch)
            if not done:
                raise GetTimeoutError(f"{len(pending)} of {len(references)} results")
            if fetch:
                ray.get(done)
        return ray.get(list(references)) if fetch else []
    except GetTimeoutError as error:
        raise DeadlineError(
            f"waited {seconds:.0f} s for {what} from {who}: {len(pending)} of {len(references)} "
            "results did not come. Raise the deadline under `deadlines`, or look at the worker's "
            "log in the Ray dashboard"
        ) from error
    except RayTaskError as error:
        failed = error
    except (ActorDiedError, ActorUnavailableError) as error:
        failed = error
    raise _own_error(failed, who=who, what=what) from failed


def _own_error(failed: Exception, *, who: str, what: str) -> DistillError:
    """The worker's DistillError with the worker's name, or a WorkerError with its traceback."""
    cause = getattr(failed, "cause", None)
    if isinstance(cause, DistillError):
        return type(cause)(f"{who}: {cause}")
    lines = str(failed).strip().splitlines()[-LAST_TRACEBACK_LINES:]
    return WorkerError(f"{who} failed at {what}:\n" + "\n".join(lines))
