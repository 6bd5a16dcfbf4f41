"""Workers of a driver that has died, which may live for some seconds more.

Ray ends a driver's workers once it has noticed the driver's death, and gives their places back. A
driver that begins at once, as a scheduler's retry does, waits for that: two learners would write
one checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import ray.util

from distill_system.errors import RunStateError

GONE_SECONDS = 60.0
"""For Ray to notice a driver's death: at once by its connection, after some missed signs of life
where its whole node is lost."""

POLL_SECONDS = 0.5


def wait_until_gone(
    namespace: str, *, notify: Callable[[str], None], seconds: float = GONE_SECONDS
) -> None:
    """Wait until no worker lives in a namespace in which this process has started none.

    Raises: RunStateError after so many seconds: the driver of those workers is alive.
    """
    deadline, told = time.monotonic() + seconds, False
    while left := _workers_in(namespace):
        if not told:
            notify(f"waiting for workers of a driver before this one to end: {', '.join(left)}")
            told = True
        if time.monotonic() >= deadline:
            raise RunStateError(
                f"this cluster trains this run already: its workers {', '.join(left)} were there "
                f"before this driver began, and still are after {seconds:g} s. End the other one, "
                "or give this run another name (name=...)"
            )
        time.sleep(POLL_SECONDS)


def _workers_in(namespace: str) -> list[str]:
    every = ray.util.list_named_actors(all_namespaces=True)
    return sorted(found["name"] for found in every if found["namespace"] == namespace)
